/* What the floors have in common: they end at the first error, and read one clock. */
#ifndef BENCH_FLOOR_H
#define BENCH_FLOOR_H

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static inline void check(int failed, const char *what)
{
	if (failed) {
		perror(what);
		exit(1);
	}
}

/* Seconds on the monotonic clock. */
static inline double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

#endif
