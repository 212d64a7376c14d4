/* SPDX-License-Identifier: MIT */
/*
 * What calls cost, in cycles of the time stamp counter: one that the host looks at,
 * counts and refuses, which is the way there and back and as little as can be in
 * between; and with a device, a page mapped and unmapped, and a list of 64. Prints
 * a figure for each round, after a warm-up:
 *
 *	guest: WHAT CYCLES...		WHAT: refused, pair, list
 *
 * count=N: calls or pairs in a round, and 16 times as many as lists (default 20000)
 * only=pair, only=list: nothing but that, to look into it
 */
#include "lib.h"

#define ROUNDS	5
#define LIST	64u

static struct pvdma_counters counters;
static struct pvdma_host host;
static u32 handle;
static u64 turn;
static struct pvdma_entry entries[PVDMA_PAGE_BYTES / sizeof(struct pvdma_entry)]
	__attribute__((aligned(PVDMA_PAGE_BYTES)));

static u64 cycles(void)
{
	u32 low, high;

	__asm__ volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
	return ((u64)high << 32) | low;
}

static void must(bool holds, const char *what)
{
	if (holds)
		return;
	print("guest: %s\n", what);
	power_off();
}

/* A handle that is nobody's. */
static void refused(void)
{
	must(pvdma_unmap(&host, &counters, 0, 4096, 4096),
	     "a call that has to be refused was not");
}

/* Pages of 16 MiB of RAM, no two in a row that are neighbours. */
static u64 next_page(void)
{
	turn = (turn + 7) % 4096;
	return (1ul << 25) + turn * PVDMA_PAGE_BYTES;
}

static void pair(void)
{
	u64 iova;

	must(!pvdma_map(&host, &counters, handle, next_page(), PVDMA_PAGE_BYTES, ~0ul,
			PVDMA_MAP_READ | PVDMA_MAP_WRITE, &iova), "map");
	must(!pvdma_unmap(&host, &counters, handle, iova, PVDMA_PAGE_BYTES), "unmap");
}

static void list(void)
{
	struct pvdma_list list;
	u64 iova;
	u32 i;

	pvdma_list_start(&list, entries, LIST, LIST, ~0ul);
	for (i = 0; i < LIST; i++)
		pvdma_list_add(&list, next_page(), PVDMA_PAGE_BYTES);
	must(!pvdma_map_list(&host, &counters, handle, &list, (u64)entries, ~0ul,
			     PVDMA_MAP_READ | PVDMA_MAP_WRITE, &iova), "map_list");
	must(!pvdma_unmap(&host, &counters, handle, iova, list.pages * PVDMA_PAGE_BYTES),
	     "unmap of a list");
}

static void measure(const char *name, void (*body)(void), u32 count)
{
	unsigned long taken[ROUNDS];
	u32 round, i;

	for (i = 0; i < count; i++)
		body();
	for (round = 0; round < ROUNDS; round++) {
		u64 start = cycles();

		for (i = 0; i < count; i++)
			body();
		taken[round] = (cycles() - start) / count;
	}
	print("guest: %s %lu %lu %lu %lu %lu\n", name, taken[0], taken[1], taken[2], taken[3],
	      taken[4]);
}

/* The first device on the bus that is assigned, if there is one. */
static u32 find_device(void)
{
	struct pvdma_assignment answer;
	u32 device;

	for (device = 0; device < 32; device++) {
		if (!pvdma_is_assigned(&host, &counters, device << 3, &answer) && answer.handle)
			return answer.handle;
	}
	return 0;
}

void guest_main(void)
{
	u32 count = (u32)option_number("count", 20000);

	if (pvdma_discover(&host) != PVDMA_FOUND) {
		print("guest: no host\n");
		return;
	}
	handle = find_device();
	if (!has_option("only=pair") && !has_option("only=list"))
		measure("refused", refused, count);
	if (handle && !has_option("only=list"))
		measure("pair", pair, count);
	if (handle && !has_option("only=pair"))
		measure("list", list, count / 16);
}
