/* linux/kvm.h: as much of it as makes the descriptors that a live update may one day preserve. */
#ifndef PYLUO_UAPI_KVM_H
#define PYLUO_UAPI_KVM_H

#include <linux/ioctl.h>
#include <stdint.h>

struct kvm_create_guest_memfd {
	uint64_t size;
	uint64_t flags;
	uint64_t reserved[6];
};

#define KVM_CREATE_VM _IO(0xAE, 0x01)
#define KVM_CREATE_GUEST_MEMFD _IOWR(0xAE, 0xd4, struct kvm_create_guest_memfd)

#endif
