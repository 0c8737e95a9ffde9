/*
 * The driver of QEMU's edu device (docs/specs/edu.rst), in the VM that it is assigned to. It has the
 * device copy a page from the VM's RAM into its own memory and back to another page, compares the
 * two, and waits for an interrupt after each transfer. It reaches the device's registers directly.
 */
#include "program.h"

#define DEVICE 0xe0000000ul /* where the VMM shows the device's BAR 0 */
#define PIN 20		    /* which the VMM connects to the device's MSI */
#define VECTOR 0x42

#define IDENTITY 0x00
#define STATUS 0x24
#define ACKNOWLEDGE 0x64
#define SOURCE 0x80
#define TARGET 0x88
#define LENGTH 0x90
#define COMMAND 0x98
#define RUN 1
#define TO_RAM 2
#define WITH_IRQ 4
#define BUFFER 0x40000 /* the device's own memory */
#define BYTES 2048     /* QEMU 7.2 aborts if a transfer reaches the end of the device's 4096 */

enum step { IDLE, TO_DEVICE, FROM_DEVICE };

static uint64_t sent[BYTES / 8] __attribute__((aligned(4096)));
static volatile uint64_t returned[BYTES / 8] __attribute__((aligned(4096)));
static enum step step;
static uint64_t started;	     /* transfers */
static volatile uint64_t interrupts; /* of the device */
static uint64_t copies;		     /* that went to the device and back, and were compared */
static uint64_t damaged;	     /* words that did not come back as they were sent */
static uint64_t late;		     /* interrupts before the transfer had ended */

static volatile uint64_t *at(uint32_t offset)
{
	return (volatile uint64_t *)(DEVICE + offset);
}

__attribute__((interrupt)) static void on_interrupt(struct frame *frame)
{
	(void)frame;
	*(volatile uint32_t *)at(ACKNOWLEDGE) = *(volatile uint32_t *)at(STATUS);
	interrupts++;
	*lapic(0xb0) = 0;
}

static void transfer(enum step next, uint64_t source, uint64_t target, uint64_t command)
{
	step = next;
	started++;
	*at(SOURCE) = source;
	*at(TARGET) = target;
	*at(LENGTH) = BYTES;
	*at(COMMAND) = RUN | WITH_IRQ | command;
}

void start_device(void)
{
	set_gate(VECTOR, on_interrupt);
	route_pin(PIN, VECTOR);
}

void use_device(void)
{
	if (interrupts < started)
		return;
	if (started && *at(COMMAND) & RUN)
		late++;
	switch (step) {
	case FROM_DEVICE:
		for (int word = 0; word < BYTES / 8; word++)
			damaged += returned[word] != sent[word];
		copies++;
		/* fall through */
	case IDLE:
		for (int word = 0; word < BYTES / 8; word++) {
			sent[word] = (copies << 16 | word) * 0x9e3779b97f4a7c15ul;
			returned[word] = 0;
		}
		transfer(TO_DEVICE, (uint64_t)sent, BUFFER, 0);
		break;
	case TO_DEVICE:
		transfer(FROM_DEVICE, BUFFER, (uint64_t)returned, TO_RAM);
		break;
	}
}

void say_device(void)
{
	say_number("device", *(volatile uint32_t *)at(IDENTITY));
	say_number("copies", copies);
	say_number("interrupts", interrupts);
	say_number("damaged", damaged);
	say_number("late", late);
}
