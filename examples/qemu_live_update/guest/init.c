/*
 * The only process of the Linux in the VM. On each CPU, a thread changes a pattern in its part of the
 * memory and checks every word before. The main thread appends records to a file in a tmpfs, reads
 * all of them back, reads the clocks, and says on the console how far everything is. If the VM has a network,
 * another thread has a connection with a peer, checks every byte that comes, and sends it back.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CPUS 16
#define WORDS (4096 / 8)
#define LINE_EVERY 250000000ull /* nanoseconds */
#define RECORDS 4096		/* in the file, before it begins anew */

struct worker {
	pthread_t thread;
	unsigned int cpu;
	uint64_t pages;
	uint64_t *memory;
	uint32_t *versions; /* of the pattern in each page */
	volatile uint64_t changed;
} __attribute__((aligned(128)));

static struct worker workers[MAX_CPUS];
static volatile uint64_t wrong;	   /* words and records that are not as they were written */
static uint64_t backwards;	   /* readings of a clock that were less than the one before */
static volatile uint64_t received; /* bytes of the peer's stream, each as it should be */
static char command_line[4096];

static void die(const char *what)
{
	printf("vm failed: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static uint64_t read_clock(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static uint64_t value_of(uint64_t page, uint64_t word, uint64_t version)
{
	return (page * WORDS + word) * 0x9e3779b97f4a7c15ull ^ version * 0xc2b2ae3d27d4eb4full;
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(worker->cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("sched_setaffinity");
	for (uint64_t page = 0;; page = (page + 1) % worker->pages) {
		uint64_t *words = worker->memory + page * WORDS;
		uint32_t version = worker->versions[page]++;

		for (unsigned int word = 0; word < WORDS; word++) {
			uint64_t expected = version ? value_of(page, word, version) : 0;

			if (words[word] != expected)
				__sync_fetch_and_add(&wrong, 1);
			words[word] = value_of(page, word, version + 1);
		}
		worker->changed++;
		/* The VM may share one CPU of an emulated machine with its VMM. */
		usleep(200);
	}
	return NULL;
}

static void start_workers(unsigned int cpus, uint64_t bytes)
{
	for (unsigned int cpu = 0; cpu < cpus; cpu++) {
		struct worker *worker = &workers[cpu];

		worker->cpu = cpu;
		worker->pages = bytes / cpus / 4096;
		worker->memory = aligned_alloc(4096, worker->pages * 4096);
		worker->versions = calloc(worker->pages, sizeof(*worker->versions));
		if (!worker->memory || !worker->versions)
			die("memory");
		memset(worker->memory, 0, worker->pages * 4096);
		if (pthread_create(&worker->thread, NULL, work, worker))
			die("pthread_create");
	}
}

/* Appends a record to a file in a tmpfs, and checks all records that are there. */
static void use_files(uint64_t number)
{
	static uint64_t records[RECORDS], first;
	uint64_t count = number - first;
	int file = open("/tmp/records", O_RDWR | O_CREAT | O_APPEND, 0600);

	if (file < 0)
		die("/tmp/records");
	if (pread(file, records, sizeof(records), 0) != (ssize_t)(count * 8))
		__sync_fetch_and_add(&wrong, 1);
	for (uint64_t record = 0; record < count; record++)
		if (records[record] != value_of(first + record, 0, 1))
			__sync_fetch_and_add(&wrong, 1);
	if (count == RECORDS) {
		first = number;
		if (ftruncate(file, 0))
			die("ftruncate");
	}
	records[0] = value_of(number, 0, 1);
	if (write(file, records, 8) != 8)
		die("write");
	close(file);
}

/* The byte at this offset of the peer's stream. */
static uint8_t stream_byte(uint64_t offset)
{
	return offset ^ offset >> 8 ^ offset >> 16;
}

/* Sends back what a peer sends. The first connection is the only one, and must never end. */
static void *talk(void *argument)
{
	static uint8_t bytes[4096];
	int connection = accept(*(int *)argument, NULL, NULL);
	ssize_t length;

	if (connection < 0)
		die("accept");
	while ((length = read(connection, bytes, sizeof(bytes))) > 0) {
		for (ssize_t at = 0; at < length; at++)
			if (bytes[at] != stream_byte(received + at))
				__sync_fetch_and_add(&wrong, 1);
		received += length;
		for (ssize_t sent = 0, part; sent < length; sent += part)
			if ((part = write(connection, bytes + sent, length - sent)) < 0)
				die("write to the peer");
	}
	if (!length)
		errno = ECONNRESET;
	die("read from the peer");
	return NULL;
}

/* Gives the first interface an address of a network of 24 bits, and waits for a peer there. */
static void start_network(const char *address, uint16_t port)
{
	static pthread_t thread;
	static int listener;
	struct ifreq request = {.ifr_name = "eth0"};
	struct sockaddr_in *in = (struct sockaddr_in *)&request.ifr_addr;
	struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(port)};

	listener = socket(AF_INET, SOCK_STREAM, 0);
	in->sin_family = AF_INET;
	if (listener < 0 || inet_pton(AF_INET, address, &in->sin_addr) != 1 ||
	    ioctl(listener, SIOCSIFADDR, &request))
		die(address);
	in->sin_addr.s_addr = htonl(0xffffff00);
	if (ioctl(listener, SIOCSIFNETMASK, &request))
		die("SIOCSIFNETMASK");
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	if (ioctl(listener, SIOCSIFFLAGS, &request))
		die("SIOCSIFFLAGS");
	if (bind(listener, (struct sockaddr *)&any, sizeof(any)) || listen(listener, 1))
		die("listen");
	if (pthread_create(&thread, NULL, talk, &listener))
		die("pthread_create");
}

/* Returns the value of a word NAME=VALUE of the kernel's command line, or NULL. */
static const char *find_word(const char *name)
{
	static char value[64];
	const char *start = command_line;
	size_t length = strlen(name);

	while ((start = strstr(start, name))) {
		if ((start == command_line || start[-1] == ' ') && start[length] == '=') {
			sscanf(start + length + 1, "%63s", value);
			return value;
		}
		start += length;
	}
	return NULL;
}

static uint64_t number_of(const char *name, uint64_t otherwise)
{
	const char *value = find_word(name);

	return value ? strtoull(value, NULL, 10) : otherwise;
}

static void read_text(const char *path, char *text, size_t size)
{
	int file = open(path, O_RDONLY);
	ssize_t length = read(file, text, size - 1);

	if (length <= 0)
		die(path);
	text[length] = 0;
	text[strcspn(text, "\n")] = 0;
	close(file);
}

int main(void)
{
	unsigned int cpus = sysconf(_SC_NPROCESSORS_ONLN);
	uint64_t last = 0, last_real = 0, gap = 0, next = 0, lines = 0;
	const char *address;
	uint16_t port;
	char boot[64];

	klogctl(8, NULL, 1); /* no message of the kernel in the midst of a line, but its panic */
	if (mount("proc", "/proc", "proc", 0, NULL) || mount("tmp", "/tmp", "tmpfs", 0, NULL))
		die("mount");
	read_text("/proc/cmdline", command_line, sizeof(command_line));
	read_text("/proc/sys/kernel/random/boot_id", boot, sizeof(boot));
	start_workers(cpus < MAX_CPUS ? cpus : MAX_CPUS, number_of("vm.mib", 16) << 20);
	port = number_of("vm.port", 7);
	if ((address = find_word("vm.address")))
		start_network(address, port);
	for (;;) {
		uint64_t now = read_clock(CLOCK_MONOTONIC), real = read_clock(CLOCK_REALTIME);

		backwards += now < last;
		backwards += real < last_real;
		if (last && now - last > gap)
			gap = now - last;
		last = now;
		last_real = real;
		if (now >= next) {
			use_files(lines);
			printf("vm boot=%s lines=%llu", boot, (unsigned long long)lines++);
			for (unsigned int cpu = 0; cpu < cpus && cpu < MAX_CPUS; cpu++)
				printf(" changed%u=%llu", cpu,
				       (unsigned long long)workers[cpu].changed);
			printf(" clock=%llu realtime=%llu gap=%llu received=%llu wrong=%llu "
			       "backwards=%llu\n",
			       (unsigned long long)now, (unsigned long long)real,
			       (unsigned long long)gap, (unsigned long long)received,
			       (unsigned long long)wrong, (unsigned long long)backwards);
			fflush(stdout);
			gap = 0;
			next = now + LINE_EVERY;
		}
		usleep(10000);
	}
}
