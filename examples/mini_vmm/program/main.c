/*
 * The program that runs in the VM. Every vCPU fills its pages of memory with a pattern, checks each
 * byte before it changes it, reads its clocks, takes timer interrupts, and keeps values in registers
 * that nothing but a faithful VMM preserves. The first one says on the serial port how far they are.
 */
#include "program.h"

/* What the VMM leaves at BOOT; see machine.py. */
struct boot {
	uint32_t cpus;
	uint32_t pages;
	uint64_t first;
};

#define BOOT ((const volatile struct boot *)0x1000)
#define MAX_CPUS 16
#define MAX_PAGES (1 << 20)
#define PAGE 4096
#define WORDS (PAGE / 8)

#define SERIAL 0x3f8
#define PIT 0x40
#define VECTOR_TIMER 0x40
#define VECTOR_PIT 0x41
#define VECTOR_SPURIOUS 0xff

#define MSR_KVM_SYSTEM_TIME_NEW 0x4b564d01
#define MSR_KERNEL_GS_BASE 0xc0000102
#define PVCLOCK_TSC_STABLE (1 << 0)
#define PVCLOCK_GUEST_STOPPED (1 << 1)

#define TIMER_HZ 20
#define LINES_EVERY 5 /* interrupts of the timer of the first vCPU */
#define PAUSE_EVERY 64 /* pages */

struct kvmclock {
	volatile uint32_t version;
	uint32_t pad;
	volatile uint64_t tsc;
	volatile uint64_t nanoseconds;
	volatile uint32_t multiplier;
	volatile int8_t shift;
	volatile uint8_t flags;
	uint8_t pad2[2];
} __attribute__((aligned(64)));

/* What a vCPU counts, each on cache lines of its own. */
struct cpu {
	struct kvmclock clock;
	volatile uint64_t changed;   /* pages that were checked and changed */
	volatile uint64_t ticks;     /* interrupts of the local APIC's timer */
	volatile uint64_t stopped;   /* pauses that the VMM announced */
	volatile uint64_t last_time;
	volatile uint64_t last_tsc;
	volatile uint64_t gap;       /* the greatest step of the clock since it was last said, ns */
} __attribute__((aligned(128)));

/* A program that drives a device defines these. */
__attribute__((weak)) void start_device(void)
{
}

__attribute__((weak)) void use_device(void)
{
}

__attribute__((weak)) void say_device(void)
{
}

static struct cpu cpus[MAX_CPUS];
static volatile uint64_t pit_ticks;
static volatile uint64_t wrong;     /* words that did not have the value that was written */
static volatile uint64_t backwards; /* readings of a clock that were less than the one before */
static volatile uint64_t registers; /* registers that did not have the value that was written */
static volatile uint64_t latest;    /* what any vCPU has last read from the clock */
static volatile uint32_t ready;
static uint32_t versions[MAX_PAGES]; /* of the pattern in each page */

static inline void out8(uint16_t port, uint8_t value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t in8(uint16_t port)
{
	uint8_t value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline uint64_t read_tsc(void)
{
	uint32_t low, high;

	asm volatile("lfence; rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

static inline void write_msr(uint32_t msr, uint64_t value)
{
	asm volatile("wrmsr" : : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)));
}

static inline uint64_t read_msr(uint32_t msr)
{
	uint32_t low, high;

	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return (uint64_t)high << 32 | low;
}

static inline void add(volatile uint64_t *counter, uint64_t value)
{
	asm volatile("lock addq %1, %0" : "+m"(*counter) : "r"(value) : "memory");
}

/* A line of text, which goes to the serial port in one string instruction. */
static char line[512];
static unsigned int length;

static void say(const char *text)
{
	while (*text)
		line[length++] = *text++;
}

void say_number(const char *name, uint64_t value)
{
	char digits[20];
	int count = 0;

	say(" ");
	say(name);
	say("=");
	do
		digits[count++] = '0' + value % 10;
	while (value /= 10);
	while (count)
		line[length++] = digits[--count];
}

static void send_line(void)
{
	const char *next = line;
	uint64_t count;

	line[length++] = '\n';
	count = length;
	while (!(in8(SERIAL + 5) & 0x20))
		;
	asm volatile("rep outsb" : "+S"(next), "+c"(count) : "d"((uint16_t)SERIAL) : "memory");
	length = 0;
}

__attribute__((interrupt)) static void on_timer(struct frame *frame)
{
	(void)frame;
	cpus[*lapic(0x20) >> 24].ticks++;
	*lapic(0xb0) = 0;
}

__attribute__((interrupt)) static void on_pit(struct frame *frame)
{
	(void)frame;
	pit_ticks++;
	*lapic(0xb0) = 0;
}

__attribute__((interrupt)) static void on_spurious(struct frame *frame)
{
	(void)frame;
}

static void die(struct frame *frame, uint64_t code)
{
	uint64_t address;

	asm volatile("cli; mov %%cr2, %0" : "=r"(address));
	length = 0;
	say("vm exception");
	say_number("ip", frame->ip);
	say_number("code", code);
	say_number("address", address);
	send_line();
	for (;;)
		asm volatile("hlt");
}

__attribute__((interrupt)) static void on_exception(struct frame *frame)
{
	die(frame, 0);
}

__attribute__((interrupt)) static void on_exception_with_code(struct frame *frame, uint64_t code)
{
	die(frame, code);
}

static struct {
	uint16_t low, selector;
	uint8_t stack, kind;
	uint16_t middle;
	uint32_t high, reserved;
} gates[256] __attribute__((aligned(16)));

void set_gate(int vector, void *handler)
{
	uint64_t address = (uint64_t)handler;

	gates[vector].low = address;
	gates[vector].middle = address >> 16;
	gates[vector].high = address >> 32;
	gates[vector].selector = 0x08;
	gates[vector].kind = 0x8e;
}

static void load_gates(void)
{
	struct {
		uint16_t limit;
		uint64_t base;
	} __attribute__((packed)) table = { sizeof(gates) - 1, (uint64_t)gates };

	asm volatile("lidt %0" : : "m"(table));
}

static void set_gates(void)
{
	for (int vector = 0; vector < 32; vector++)
		set_gate(vector, on_exception);
	set_gate(8, on_exception_with_code);
	for (int vector = 10; vector < 15; vector++)
		set_gate(vector, on_exception_with_code);
	set_gate(17, on_exception_with_code);
	set_gate(VECTOR_TIMER, on_timer);
	set_gate(VECTOR_PIT, on_pit);
	set_gate(VECTOR_SPURIOUS, on_spurious);
}

void route_pin(unsigned int pin, uint8_t vector)
{
	volatile uint32_t *select = (volatile uint32_t *)IOAPIC;
	volatile uint32_t *window = (volatile uint32_t *)(IOAPIC + 0x10);

	*select = 0x10 + 2 * pin + 1;
	*window = 0;
	*select = 0x10 + 2 * pin;
	*window = vector;
}

static void start_pit(void)
{
	unsigned int divisor = 1193182 / TIMER_HZ;

	out8(0x21, 0xff); /* the PICs have nothing to do */
	out8(0xa1, 0xff);
	route_pin(0, VECTOR_PIT);
	out8(PIT + 3, 0x34);
	out8(PIT, divisor);
	out8(PIT, divisor >> 8);
}

static void start_timer(void)
{
	*lapic(0xf0) = 0x100 | VECTOR_SPURIOUS;
	*lapic(0x3e0) = 0xb; /* divide by 1: KVM's bus runs at 1 GHz */
	*lapic(0x320) = 1 << 17 | VECTOR_TIMER; /* periodic */
	*lapic(0x380) = 1000000000 / TIMER_HZ;
}

static uint64_t read_clock(struct cpu *cpu, int *stable)
{
	struct kvmclock *clock = &cpu->clock;
	uint64_t delta, time;
	uint32_t version;

	do {
		version = clock->version;
		asm volatile("" : : : "memory");
		delta = read_tsc() - clock->tsc;
		if (clock->shift < 0)
			delta >>= -clock->shift;
		else
			delta <<= clock->shift;
		time = clock->nanoseconds +
		       (uint64_t)(((unsigned __int128)delta * clock->multiplier) >> 32);
		*stable = clock->flags & PVCLOCK_TSC_STABLE;
		asm volatile("" : : : "memory");
	} while ((version & 1) || version != clock->version);
	return time;
}

static void check_clocks(struct cpu *cpu)
{
	uint64_t before = latest, tsc, time;
	int stable;

	tsc = read_tsc();
	if (tsc < cpu->last_tsc)
		add(&backwards, 1);
	cpu->last_tsc = tsc;

	time = read_clock(cpu, &stable);
	if (time < cpu->last_time || (stable && time < before))
		add(&backwards, 1);
	if (cpu->last_time && time - cpu->last_time > cpu->gap)
		cpu->gap = time - cpu->last_time;
	cpu->last_time = time;
	if (stable && time > before)
		latest = time;

	if (cpu->clock.flags & PVCLOCK_GUEST_STOPPED) {
		cpu->clock.flags &= ~PVCLOCK_GUEST_STOPPED;
		cpu->stopped++;
	}
}

/* The values that a vCPU keeps in registers that the compiler does not use. */
static uint64_t secret(uint64_t number, uint64_t which)
{
	return (number + 1) * 0x9e3779b97f4a7c15ul ^ which * 0xff51afd7ed558ccdul;
}

static void set_registers(uint64_t number)
{
	asm volatile("movq %0, %%xmm3" : : "r"(secret(number, 1)));
	asm volatile("movq %0, %%xmm15" : : "r"(secret(number, 2)));
	asm volatile("mov %0, %%dr1" : : "r"(secret(number, 3) >> 20));
	write_msr(MSR_KERNEL_GS_BASE, secret(number, 4) >> 20);
}

static void check_registers(uint64_t number)
{
	uint64_t first, second, third, fourth;

	asm volatile("movq %%xmm3, %0" : "=r"(first));
	asm volatile("movq %%xmm15, %0" : "=r"(second));
	asm volatile("mov %%dr1, %0" : "=r"(third));
	fourth = read_msr(MSR_KERNEL_GS_BASE);
	if (first != secret(number, 1) || second != secret(number, 2) ||
	    third != secret(number, 3) >> 20 || fourth != secret(number, 4) >> 20)
		add(&registers, 1);
}

/* Check all words of a page and write the next version of the pattern over them. */
static void change_page(uint32_t page)
{
	uint64_t *words = (uint64_t *)(BOOT->first + (uint64_t)page * PAGE);
	uint64_t now = ((uint64_t)page << 32 | versions[page]) * 0x9e3779b97f4a7c15ul;
	uint64_t next = ((uint64_t)page << 32 | (versions[page] + 1)) * 0x9e3779b97f4a7c15ul;
	uint64_t found = 0;

	for (int word = 0; word < WORDS; word++) {
		uint64_t salt = (uint64_t)word * 0xc2b2ae3d27d4eb4ful;

		found += words[word] != (versions[page] ? now + salt : 0);
		words[word] = next + salt;
	}
	versions[page]++;
	if (found)
		add(&wrong, found);
}

static void report(uint64_t number)
{
	static const char *const changed[] = { "changed0", "changed1", "changed2", "changed3" };
	static const char *const ticks[] = { "ticks0", "ticks1", "ticks2", "ticks3" };
	struct cpu *cpu = &cpus[number];

	say("vm");
	say_number("cpus", BOOT->cpus);
	for (uint32_t each = 0; each < BOOT->cpus && each < 4; each++) {
		say_number(changed[each], cpus[each].changed);
		say_number(ticks[each], cpus[each].ticks);
	}
	say_number("pit", pit_ticks);
	say_number("clock", cpu->last_time);
	say_number("tsc", cpu->last_tsc);
	say_number("gap", cpu->gap);
	say_number("stopped", cpu->stopped);
	say_number("wrong", wrong);
	say_number("backwards", backwards);
	say_number("registers", registers);
	say_device();
	send_line();
	cpu->gap = 0;
}

void main(uint64_t number)
{
	struct cpu *cpu = &cpus[number];
	uint64_t said = 0;

	if (number == 0) {
		set_gates();
		start_pit();
		start_device();
		ready = 1;
	}
	while (!ready)
		asm volatile("pause" : : : "memory");
	load_gates();
	write_msr(MSR_KVM_SYSTEM_TIME_NEW, (uint64_t)&cpu->clock | 1);
	set_registers(number);
	start_timer();
	asm volatile("sti");

	for (;;) {
		for (uint32_t page = number; page < BOOT->pages; page += BOOT->cpus) {
			change_page(page);
			cpu->changed++;
			check_clocks(cpu);
			check_registers(number);
			if (number == 0)
				use_device();
			if (number == 0 && cpu->ticks / LINES_EVERY != said) {
				said = cpu->ticks / LINES_EVERY;
				report(number);
			}
			if (cpu->changed % PAUSE_EVERY == 0)
				asm volatile("hlt"); /* until the next interrupt of a timer */
		}
	}
}
