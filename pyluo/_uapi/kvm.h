/*
 * linux/kvm.h: as much of it as makes the descriptors that a live update may one day preserve, and
 * as tells a VM of its VFIO devices.
 */
#ifndef PYLUO_UAPI_KVM_H
#define PYLUO_UAPI_KVM_H

#include <linux/ioctl.h>
#include <stdint.h>

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

struct kvm_device_attr {
	uint32_t flags;
	uint32_t group;
	uint64_t attr;
	uint64_t addr;
};

#define KVM_DEV_TYPE_VFIO 4
#define KVM_DEV_VFIO_FILE 1
#define KVM_DEV_VFIO_FILE_ADD 1
#define KVM_DEV_VFIO_FILE_DEL 2

#define KVM_CREATE_VM _IO(0xAE, 0x01)
#define KVM_CREATE_DEVICE _IOWR(0xAE, 0xe0, struct kvm_create_device)
#define KVM_SET_DEVICE_ATTR _IOW(0xAE, 0xe1, struct kvm_device_attr)
#define KVM_CREATE_GUEST_MEMFD _IOWR(0xAE, 0xd4, struct kvm_create_guest_memfd)

#endif
