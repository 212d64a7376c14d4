/* SPDX-License-Identifier: MIT */
/*
 * What calls cost, in cycles of the time stamp counter: one that is refused at once,
 * a page mapped and unmapped, a list of 64 scattered pages. Prints, for the first
 * assigned device and round by round, after a warm-up of as many calls:
 *
 *	guest: refused|pair|list CYCLES...
 *
 * count=N: calls, pairs in a round, 64 times as many as lists (default 20000)
 */
#include "lib.h"

#define ROUNDS	5
#define PAGES	64

static u8 memory[2 * PAGES][4096] __attribute__((aligned(4096)));
static struct pvdma_entry call_page[256] __attribute__((aligned(4096)));
static struct pvdma_counters counters;
static struct pvdma_host host;
static u32 handle;

static u64 cycles(void)
{
	u32 low, high;

	__asm__ volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
	return ((u64)high << 32) | low;
}

static void must(u32 status, const char *what)
{
	if (!status)
		return;
	print("guest: %s failed: %x\n", what, status);
	power_off();
}

/* A handle that is nobody's: the way there and back, and nothing in between. */
static void refused(u32 turn)
{
	if (pvdma_unmap(&host, &counters, 0, (u64)turn << 12, 4096) == 0)
		must(1, "refusing");
}

static void pair(u32 turn)
{
	u64 iova;

	must(pvdma_map(&host, &counters, handle, (u64)memory[turn % PAGES * 2], 4096, ~0ull,
		       PVDMA_MAP_READ, &iova), "map");
	must(pvdma_unmap(&host, &counters, handle, iova, 4096), "unmap");
}

static void list(u32 turn)
{
	struct pvdma_list list;
	u64 iova;
	u32 i;

	(void)turn;
	pvdma_list_start(&list, call_page, 256, 256, ~0ull);
	for (i = 0; i < PAGES; i++)
		pvdma_list_add(&list, (u64)memory[i * 2], 4096);
	must(pvdma_map_list(&host, &counters, handle, &list, (u64)call_page, ~0ull,
			    PVDMA_MAP_READ, &iova), "map_list");
	must(pvdma_unmap(&host, &counters, handle, iova, PAGES * 4096), "unmap");
}

static void measure(const char *name, void (*step)(u32 turn), u32 count)
{
	unsigned long taken[ROUNDS];
	u32 round, i;

	for (i = 0; i < count; i++)
		step(i);
	for (round = 0; round < ROUNDS; round++) {
		u64 start = cycles();

		for (i = 0; i < count; i++)
			step(i);
		taken[round] = (cycles() - start) / count;
	}
	print("guest: %s %lu %lu %lu %lu %lu\n", name, taken[0], taken[1], taken[2], taken[3],
	      taken[4]);
}

void guest_main(void)
{
	u32 count = (u32)option_number("count", 20000);
	struct pvdma_assignment assignment;
	u32 slot;

	if (pvdma_discover(&host) != PVDMA_FOUND)
		must(1, "discovery");
	for (slot = 1; slot < 32 && !handle; slot++) {
		if (pvdma_is_assigned(&host, &counters, slot << 3, &assignment) == 0)
			handle = assignment.handle;
	}
	if (!handle)
		must(1, "finding a device");
	measure("refused", refused, count);
	measure("pair", pair, count);
	measure("list", list, count / PAGES + 1);
}
