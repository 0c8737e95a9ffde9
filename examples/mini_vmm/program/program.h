/* What the program that runs in the VM offers to the driver of a device. */
#include <stdint.h>

#define LAPIC 0xfee00000ul
#define IOAPIC 0xfec00000ul

struct frame {
	uint64_t ip, cs, flags, sp, ss;
};

static inline volatile uint32_t *lapic(uint32_t offset)
{
	return (volatile uint32_t *)(LAPIC + offset);
}

/* Adds " NAME=VALUE" to the line that is being said. */
void say_number(const char *name, uint64_t value);

/* Has an interrupt handler called for a vector, which is at least 32. */
void set_gate(int vector, void *handler);

/* Routes a pin of the I/O APIC to a vector of the first vCPU, edge-triggered. */
void route_pin(unsigned int pin, uint8_t vector);

/* What the driver defines: all of them run on the first vCPU. */
void start_device(void);
void use_device(void);
void say_device(void);
