/* linux/if.h: the argument of ioctls that are about a network interface. */
#ifndef PYLUO_UAPI_IF_H
#define PYLUO_UAPI_IF_H

#include <stdint.h>

#define IFNAMSIZ 16

struct ifmap {
	unsigned long mem_start;
	unsigned long mem_end;
	uint16_t base_addr;
	uint8_t irq;
	uint8_t dma;
	uint8_t port;
};

struct ifreq {
	char ifr_name[16];
	union {
		int16_t ifr_flags;
		struct ifmap ifr_map;
	};
};

#endif
