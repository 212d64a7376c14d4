/* SPDX-License-Identifier: MIT */
/*
 * What a call costs that the host looks at, counts and refuses, in cycles of the time
 * stamp counter: the way there and back, and as little as can be in between. Prints a
 * figure for each round, after a warm-up of as many calls as a round has:
 *
 *	guest: refused CYCLES...
 *
 * count=N: calls in a round (default 20000)
 */
#include "lib.h"

#define ROUNDS	5

static struct pvdma_counters counters;
static struct pvdma_host host;

static u64 cycles(void)
{
	u32 low, high;

	__asm__ volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
	return ((u64)high << 32) | low;
}

/* A handle that is nobody's. */
static void refused(void)
{
	if (pvdma_unmap(&host, &counters, 0, 4096, 4096))
		return;
	print("guest: a call that has to be refused was not\n");
	power_off();
}

void guest_main(void)
{
	u32 count = (u32)option_number("count", 20000);
	unsigned long taken[ROUNDS];
	u32 round, i;

	if (pvdma_discover(&host) != PVDMA_FOUND) {
		print("guest: no host\n");
		return;
	}
	for (i = 0; i < count; i++)
		refused();
	for (round = 0; round < ROUNDS; round++) {
		u64 start = cycles();

		for (i = 0; i < count; i++)
			refused();
		taken[round] = (cycles() - start) / count;
	}
	print("guest: refused %lu %lu %lu %lu %lu\n", taken[0], taken[1], taken[2], taken[3],
	      taken[4]);
}
