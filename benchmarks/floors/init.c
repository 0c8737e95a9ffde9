/*
 * The floor for a live update: the first process of a guest, in its initial ramdisk.
 *
 * In the first life it preserves 16 MiB and jumps. In the next life it retrieves them, verifies them
 * and ends the machine. It tells the host what it has done in lines like "mark: reboot called".
 *
 * The next kernel and its ramdisk are the files of the host that BENCH_KERNEL and BENCH_INITRD on the
 * kernel's command line name, and the marks go to the port that the harness uses. If the ramdisk has
 * a file /alone, they are /kernel and /initrd in the ramdisk, and the marks go to the serial line:
 * such a guest needs no other device.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "liveupdate.h"
#include "reboot.h"
#include "floor.h"

#define SIZE (16UL << 20)
#define PAGE 4096
#define PORTS "/sys/class/virtio-ports"
#define SHARE "trans=virtio,version=9p2000.L,cache=loose,msize=1048576"

static unsigned char pattern[PAGE];
static int port;

static void mark(const char *event)
{
	check(dprintf(port, "mark: %s\n", event) < 0, "mark");
}

static int open_port(void)
{
	char path[300], name[64];
	struct dirent *entry;
	DIR *folder;
	FILE *file;

	for (;;) { /* the kernel adds the port in a work item */
		folder = opendir(PORTS);
		while (folder && (entry = readdir(folder))) {
			snprintf(path, sizeof(path), PORTS "/%s/name", entry->d_name);
			file = fopen(path, "r");
			if (file && fgets(name, sizeof(name), file) && !strcmp(name, "pyluo.control\n")) {
				snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
				return open(path, O_RDWR | O_CLOEXEC);
			}
			if (file)
				fclose(file);
		}
		if (folder)
			closedir(folder);
		usleep(1000);
	}
}

static int open_session(int device, unsigned long request)
{
	struct liveupdate_ioctl_create_session argument = {
		.size = sizeof(argument), .fd = -1, .name = "floor",
	};

	return ioctl(device, request, &argument) ? -1 : argument.fd;
}

static void save(int device)
{
	struct liveupdate_session_preserve_fd argument = { .size = sizeof(argument), .token = 1 };
	int session = open_session(device, LIVEUPDATE_IOCTL_CREATE_SESSION);
	int file = memfd_create("ram", MFD_CLOEXEC);

	check(session < 0, "create session");
	check(file < 0, "memfd");
	for (size_t done = 0; done < SIZE; done += PAGE)
		check(write(file, pattern, PAGE) != PAGE, "write");
	argument.fd = file;
	check(ioctl(session, LIVEUPDATE_SESSION_PRESERVE_FD, &argument), "preserve");
	mark("preserved");
}

static void load(int session)
{
	struct liveupdate_session_retrieve_fd argument = {
		.size = sizeof(argument), .fd = -1, .token = 1,
	};
	struct liveupdate_session_finish finish = { .size = sizeof(finish) };
	unsigned char *data, first;

	check(ioctl(session, LIVEUPDATE_SESSION_RETRIEVE_FD, &argument), "retrieve");
	check(pread(argument.fd, &first, 1, 0) != 1 || first != pattern[0], "first byte");
	mark("first byte read");
	data = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, argument.fd, 0);
	check(data == MAP_FAILED, "mmap");
	for (size_t done = 0; done < SIZE; done += PAGE)
		check(memcmp(data + done, pattern, PAGE), "compare");
	check(ioctl(session, LIVEUPDATE_SESSION_FINISH, &finish), "finish");
	mark("verified");
}

static void jump(const char *kernel, const char *initrd)
{
	static char cmdline[4096];
	int line = open("/proc/cmdline", O_RDONLY);
	ssize_t length = read(line, cmdline, sizeof(cmdline) - 1);
	int image = open(kernel, O_RDONLY), ramdisk = open(initrd, O_RDONLY);

	check(length < 1, "/proc/cmdline");
	check(image < 0, kernel);
	check(ramdisk < 0, initrd);
	cmdline[length - 1] = 0; /* in place of the line break */
	check(syscall(SYS_kexec_file_load, image, ramdisk, length, cmdline, 0UL), "kexec_file_load");
	mark("reboot called");
	check(reboot(LINUX_REBOOT_CMD_KEXEC), "reboot");
}

static void mount_new(const char *source, const char *target, const char *kind, const char *options)
{
	mkdir(target, 0755);
	check(mount(source, target, kind, 0, options), target);
}

int main(void)
{
	int alone = !access("/alone", F_OK), device, session, console;
	char kernel[4096] = "/kernel", initrd[4096] = "/initrd";

	mount_new("dev", "/dev", "devtmpfs", "");
	console = open("/dev/console", O_RDWR);
	check(dup2(console, STDERR_FILENO) < 0, "/dev/console");
	mount_new("proc", "/proc", "proc", "");
	if (alone) {
		port = console;
	} else {
		mount_new("sys", "/sys", "sysfs", "");
		port = open_port();
	}
	check(port < 0, "port");
	mark("up");
	for (int place = 0; place < PAGE; place++)
		pattern[place] = place * 7 + 1;
	device = open("/dev/liveupdate", O_RDWR | O_CLOEXEC);
	check(device < 0, "/dev/liveupdate");
	session = open_session(device, LIVEUPDATE_IOCTL_RETRIEVE_SESSION);
	if (session < 0) {
		save(device);
		if (!alone) {
			mount_new("/dev/root", "/host", "9p", SHARE);
			snprintf(kernel, sizeof(kernel), "/host%s", getenv("BENCH_KERNEL"));
			snprintf(initrd, sizeof(initrd), "/host%s", getenv("BENCH_INITRD"));
		}
		jump(kernel, initrd);
	}
	load(session);
	/* A kernel without ACPI cannot power off, but QEMU ends as well if the machine is reset. */
	reboot(alone ? LINUX_REBOOT_CMD_RESTART : LINUX_REBOOT_CMD_POWER_OFF);
	return 1;
}
