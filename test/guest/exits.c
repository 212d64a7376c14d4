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
 * only refused, only pair, only list: nothing but that, to look into it
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

/*
 * Unmaps of a handle that is nobody's. Instructions and registers alone: what this guest
 * does of its own is as little as what the guest of test/bench/bounds.c does.
 */
static void refused(u32 count)
{
	u64 iova = PVDMA_PAGE_BYTES;
	register u64 bytes __asm__("r8") = PVDMA_PAGE_BYTES;
	u32 status;

	__asm__ volatile("1: mov %[call], %%eax\n\tout %%eax, %%dx\n\tdec %[count]\n\tjnz 1b"
			 : "=&a"(status), [count] "+c"(count), "+S"(iova), "+r"(bytes)
			 : [call] "i"(PVDMA_CALL_UNMAP), "d"(host.port), "D"(0ul)
			 : "memory", "cc");
	/* as test/bench/bounds.c refuses it; 19 is ENODEV */
	must(status == (PVDMA_STATUS_INVALID | 19 << 8), "the last of the calls to refuse was not");
}

/* Pages of 16 MiB of RAM, no two in a row that are neighbours. */
static u64 next_page(void)
{
	turn = (turn + 7) % 4096;
	return (1ul << 25) + turn * PVDMA_PAGE_BYTES;
}

static void pairs(u32 count)
{
	u64 iova;

	while (count--) {
		must(!pvdma_map(&host, &counters, handle, next_page(), PVDMA_PAGE_BYTES, ~0ul,
				PVDMA_MAP_READ | PVDMA_MAP_WRITE, &iova), "map");
		must(!pvdma_unmap(&host, &counters, handle, iova, PVDMA_PAGE_BYTES), "unmap");
	}
}

static void lists(u32 count)
{
	struct pvdma_list list;
	u64 iova;
	u32 i;

	while (count--) {
		pvdma_list_start(&list, entries, LIST, LIST, ~0ul);
		for (i = 0; i < LIST; i++)
			pvdma_list_add(&list, next_page(), PVDMA_PAGE_BYTES);
		must(!pvdma_map_list(&host, &counters, handle, &list, (u64)entries, ~0ul,
				     PVDMA_MAP_READ | PVDMA_MAP_WRITE, &iova), "map_list");
		must(!pvdma_unmap(&host, &counters, handle, iova,
				  list.pages * PVDMA_PAGE_BYTES), "unmap of a list");
	}
}

static void measure(const char *name, void (*body)(u32 count), u32 count)
{
	unsigned long taken[ROUNDS];
	u32 round;

	body(count);
	for (round = 0; round < ROUNDS; round++) {
		u64 start = cycles();

		body(count);
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

static bool wanted(const char *name)
{
	return !has_option("only") || has_option(name);
}

void guest_main(void)
{
	u32 count = (u32)option_number("count", 20000);

	if (pvdma_discover(&host) != PVDMA_FOUND) {
		print("guest: no host\n");
		return;
	}
	/* a list counts for 16 */
	must(count >= 16, "count=N: 16 at the least");
	handle = find_device();
	if (wanted("refused"))
		measure("refused", refused, count);
	if (handle && wanted("pair"))
		measure("pair", pairs, count);
	if (handle && wanted("list"))
		measure("list", lists, count / 16);
}
