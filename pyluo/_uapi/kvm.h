/*
 * linux/kvm.h: what a VM on x86 consists of, its state and its exits; what makes the descriptors
 * that a live update may one day preserve.
 */
#ifndef PYLUO_UAPI_KVM_H
#define PYLUO_UAPI_KVM_H

#include <linux/ioctl.h>
#include <stdint.h>

#include "kvm_x86.h"

#define KVM_API_VERSION 12

struct kvm_userspace_memory_region {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
};

#define KVM_MEM_LOG_DIRTY_PAGES (1UL << 0)
#define KVM_MEM_READONLY (1UL << 1)

struct kvm_irq_level {
	union {
		uint32_t irq;
		int32_t status;
	};
	uint32_t level;
};

struct kvm_irqfd {
	uint32_t fd;
	uint32_t gsi;
	uint32_t flags;
	uint32_t resamplefd;
	uint8_t pad[16];
};

#define KVM_IRQFD_FLAG_DEASSIGN (1 << 0)
#define KVM_IRQFD_FLAG_RESAMPLE (1 << 1)

struct kvm_irqchip {
	uint32_t chip_id;
	uint32_t pad;
	union {
		char dummy[512];
	} chip;
};

struct kvm_pit_config {
	uint32_t flags;
	uint32_t pad[15];
};

#define KVM_EXIT_UNKNOWN 0
#define KVM_EXIT_EXCEPTION 1
#define KVM_EXIT_IO 2
#define KVM_EXIT_HYPERCALL 3
#define KVM_EXIT_DEBUG 4
#define KVM_EXIT_HLT 5
#define KVM_EXIT_MMIO 6
#define KVM_EXIT_IRQ_WINDOW_OPEN 7
#define KVM_EXIT_SHUTDOWN 8
#define KVM_EXIT_FAIL_ENTRY 9
#define KVM_EXIT_INTR 10
#define KVM_EXIT_SET_TPR 11
#define KVM_EXIT_TPR_ACCESS 12
#define KVM_EXIT_S390_SIEIC 13
#define KVM_EXIT_S390_RESET 14
#define KVM_EXIT_DCR 15
#define KVM_EXIT_NMI 16
#define KVM_EXIT_INTERNAL_ERROR 17
#define KVM_EXIT_OSI 18
#define KVM_EXIT_PAPR_HCALL 19
#define KVM_EXIT_S390_UCONTROL 20
#define KVM_EXIT_WATCHDOG 21
#define KVM_EXIT_S390_TSCH 22
#define KVM_EXIT_EPR 23
#define KVM_EXIT_SYSTEM_EVENT 24
#define KVM_EXIT_S390_STSI 25
#define KVM_EXIT_IOAPIC_EOI 26
#define KVM_EXIT_HYPERV 27
#define KVM_EXIT_ARM_NISV 28
#define KVM_EXIT_X86_RDMSR 29
#define KVM_EXIT_X86_WRMSR 30
#define KVM_EXIT_DIRTY_RING_FULL 31
#define KVM_EXIT_AP_RESET_HOLD 32
#define KVM_EXIT_X86_BUS_LOCK 33
#define KVM_EXIT_XEN 34
#define KVM_EXIT_RISCV_SBI 35
#define KVM_EXIT_RISCV_CSR 36
#define KVM_EXIT_NOTIFY 37
#define KVM_EXIT_LOONGARCH_IOCSR 38
#define KVM_EXIT_MEMORY_FAULT 39
#define KVM_EXIT_TDX 40
#define KVM_EXIT_ARM_SEA 41
#define KVM_EXIT_ARM_LDST64B 42
#define KVM_EXIT_SNP_REQ_CERTS 43

#define KVM_EXIT_IO_IN 0
#define KVM_EXIT_IO_OUT 1

struct kvm_run {
	uint8_t request_interrupt_window;
	uint8_t immediate_exit;
	uint8_t padding1[6];
	uint32_t exit_reason;
	uint8_t ready_for_interrupt_injection;
	uint8_t if_flag;
	uint16_t flags;
	uint64_t cr8;
	uint64_t apic_base;
	union {
		struct {
			uint64_t hardware_exit_reason;
		} hw;
		struct {
			uint64_t hardware_entry_failure_reason;
			uint32_t cpu;
		} fail_entry;
		struct {
			uint8_t direction;
			uint8_t size;
			uint16_t port;
			uint32_t count;
			uint64_t data_offset;
		} io;
		struct {
			uint64_t phys_addr;
			uint8_t data[8];
			uint32_t len;
			uint8_t is_write;
		} mmio;
		struct {
			uint32_t suberror;
			uint32_t ndata;
			uint64_t data[16];
		} internal;
		struct {
			uint32_t type;
			uint32_t ndata;
			uint64_t data[16];
		} system_event;
		char padding[256];
	};
	uint64_t kvm_valid_regs;
	uint64_t kvm_dirty_regs;
	union {
		char padding[2048];
	} s;
};

#define KVM_MP_STATE_RUNNABLE 0
#define KVM_MP_STATE_UNINITIALIZED 1
#define KVM_MP_STATE_INIT_RECEIVED 2
#define KVM_MP_STATE_HALTED 3
#define KVM_MP_STATE_SIPI_RECEIVED 4
#define KVM_MP_STATE_STOPPED 5
#define KVM_MP_STATE_CHECK_STOP 6
#define KVM_MP_STATE_OPERATING 7
#define KVM_MP_STATE_LOAD 8
#define KVM_MP_STATE_AP_RESET_HOLD 9
#define KVM_MP_STATE_SUSPENDED 10

struct kvm_mp_state {
	uint32_t mp_state;
};

struct kvm_clock_data {
	uint64_t clock;
	uint32_t flags;
	uint32_t pad0;
	uint64_t realtime;
	uint64_t host_tsc;
	uint32_t pad[4];
};

#define KVM_CLOCK_TSC_STABLE 2
#define KVM_CLOCK_REALTIME (1 << 2)
#define KVM_CLOCK_HOST_TSC (1 << 3)

struct kvm_device_attr {
	uint32_t flags;
	uint32_t group;
	uint64_t attr;
	uint64_t addr;
};

struct kvm_create_guest_memfd {
	uint64_t size;
	uint64_t flags;
	uint64_t reserved[6];
};

struct kvm_create_device {
	uint32_t type;
	uint32_t fd;
	uint32_t flags;
};

#define KVM_DEV_TYPE_VFIO 4
#define KVM_DEV_VFIO_FILE 1
#define KVM_DEV_VFIO_FILE_ADD 1
#define KVM_DEV_VFIO_FILE_DEL 2

#define KVM_CAP_IRQCHIP 0
#define KVM_CAP_SET_TSS_ADDR 4
#define KVM_CAP_NR_VCPUS 9
#define KVM_CAP_MP_STATE 14
#define KVM_CAP_PIT2 33
#define KVM_CAP_ADJUST_CLOCK 39
#define KVM_CAP_VCPU_EVENTS 41
#define KVM_CAP_DEBUGREGS 50
#define KVM_CAP_XSAVE 55
#define KVM_CAP_XCRS 56
#define KVM_CAP_TSC_CONTROL 60
#define KVM_CAP_GET_TSC_KHZ 61
#define KVM_CAP_MAX_VCPUS 66
#define KVM_CAP_KVMCLOCK_CTRL 76
#define KVM_CAP_IMMEDIATE_EXIT 136
#define KVM_CAP_SREGS2 200
#define KVM_CAP_XSAVE2 208

#define KVM_GET_API_VERSION _IO(0xAE, 0x00)
#define KVM_CREATE_VM _IO(0xAE, 0x01)
#define KVM_GET_MSR_INDEX_LIST _IOWR(0xAE, 0x02, struct kvm_msr_list)
#define KVM_CHECK_EXTENSION _IO(0xAE, 0x03)
#define KVM_GET_VCPU_MMAP_SIZE _IO(0xAE, 0x04)
#define KVM_GET_SUPPORTED_CPUID _IOWR(0xAE, 0x05, struct kvm_cpuid2)

#define KVM_CREATE_DEVICE _IOWR(0xAE, 0xe0, struct kvm_create_device)
#define KVM_CREATE_VCPU _IO(0xAE, 0x41)
#define KVM_SET_USER_MEMORY_REGION _IOW(0xAE, 0x46, struct kvm_userspace_memory_region)
#define KVM_SET_TSS_ADDR _IO(0xAE, 0x47)
#define KVM_CREATE_IRQCHIP _IO(0xAE, 0x60)
#define KVM_IRQ_LINE _IOW(0xAE, 0x61, struct kvm_irq_level)
#define KVM_GET_IRQCHIP _IOWR(0xAE, 0x62, struct kvm_irqchip)
#define KVM_SET_IRQCHIP _IOR(0xAE, 0x63, struct kvm_irqchip)
#define KVM_IRQFD _IOW(0xAE, 0x76, struct kvm_irqfd)
#define KVM_CREATE_PIT2 _IOW(0xAE, 0x77, struct kvm_pit_config)
#define KVM_SET_CLOCK _IOW(0xAE, 0x7b, struct kvm_clock_data)
#define KVM_GET_CLOCK _IOR(0xAE, 0x7c, struct kvm_clock_data)
#define KVM_GET_PIT2 _IOR(0xAE, 0x9f, struct kvm_pit_state2)
#define KVM_SET_PIT2 _IOW(0xAE, 0xa0, struct kvm_pit_state2)
#define KVM_CREATE_GUEST_MEMFD _IOWR(0xAE, 0xd4, struct kvm_create_guest_memfd)

#define KVM_RUN _IO(0xAE, 0x80)
#define KVM_GET_REGS _IOR(0xAE, 0x81, struct kvm_regs)
#define KVM_SET_REGS _IOW(0xAE, 0x82, struct kvm_regs)
#define KVM_GET_MSRS _IOWR(0xAE, 0x88, struct kvm_msrs)
#define KVM_SET_MSRS _IOW(0xAE, 0x89, struct kvm_msrs)
#define KVM_GET_LAPIC _IOR(0xAE, 0x8e, struct kvm_lapic_state)
#define KVM_SET_LAPIC _IOW(0xAE, 0x8f, struct kvm_lapic_state)
#define KVM_SET_CPUID2 _IOW(0xAE, 0x90, struct kvm_cpuid2)
#define KVM_GET_CPUID2 _IOWR(0xAE, 0x91, struct kvm_cpuid2)
#define KVM_GET_MP_STATE _IOR(0xAE, 0x98, struct kvm_mp_state)
#define KVM_SET_MP_STATE _IOW(0xAE, 0x99, struct kvm_mp_state)
#define KVM_GET_VCPU_EVENTS _IOR(0xAE, 0x9f, struct kvm_vcpu_events)
#define KVM_SET_VCPU_EVENTS _IOW(0xAE, 0xa0, struct kvm_vcpu_events)
#define KVM_GET_DEBUGREGS _IOR(0xAE, 0xa1, struct kvm_debugregs)
#define KVM_SET_DEBUGREGS _IOW(0xAE, 0xa2, struct kvm_debugregs)
#define KVM_SET_TSC_KHZ _IO(0xAE, 0xa2)
#define KVM_GET_TSC_KHZ _IO(0xAE, 0xa3)
#define KVM_GET_XSAVE _IOR(0xAE, 0xa4, struct kvm_xsave)
#define KVM_SET_XSAVE _IOW(0xAE, 0xa5, struct kvm_xsave)
#define KVM_GET_XCRS _IOR(0xAE, 0xa6, struct kvm_xcrs)
#define KVM_SET_XCRS _IOW(0xAE, 0xa7, struct kvm_xcrs)
#define KVM_KVMCLOCK_CTRL _IO(0xAE, 0xad)
#define KVM_GET_SREGS2 _IOR(0xAE, 0xcc, struct kvm_sregs2)
#define KVM_SET_SREGS2 _IOW(0xAE, 0xcd, struct kvm_sregs2)
#define KVM_GET_XSAVE2 _IOR(0xAE, 0xcf, struct kvm_xsave)
#define KVM_SET_DEVICE_ATTR _IOW(0xAE, 0xe1, struct kvm_device_attr)
#define KVM_GET_DEVICE_ATTR _IOW(0xAE, 0xe2, struct kvm_device_attr)
#define KVM_HAS_DEVICE_ATTR _IOW(0xAE, 0xe3, struct kvm_device_attr)

#endif
