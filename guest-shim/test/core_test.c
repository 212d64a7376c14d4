// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * Tests of the portable core against a host written out call by call. Built for
 * the machine that runs the tests:
 *
 *	gcc -I.. -DPVDMA_TRANSPORT='"test/scripted.h"' core_test.c ../pvdma_core.c \
 *		../pvdma_lazy.c
 *
 * Without arguments the names of the tests are printed, with a name that test
 * runs; the exit status is 1 and standard error says why if it fails.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pvdma_core.h"
#include "pvdma_lazy.h"
#include "test/scripted.h"

#define MAX_STEPS	600
#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))

static void fail(int line, const char *what, u64 got, u64 want)
{
	fprintf(stderr, "core_test.c:%d: %s: %#llx, not %#llx\n", line, what, got, want);
	exit(1);
}

#define EQUAL(got, want) do { \
	u64 got_ = (u64)(got), want_ = (u64)(want); \
	if (got_ != want_) \
		fail(__LINE__, #got, got_, want_); \
} while (0)

/* The host: what it is asked, in order, and what it answers. */
struct step {
	struct pvdma_frame question;
	struct pvdma_frame answer;
};

static struct step script[MAX_STEPS];
static u32 steps, next, relaxed;
static bool live;	/* live_host() answers instead of the script */

static void step(struct pvdma_frame question, struct pvdma_frame answer)
{
	script[steps].question = question;
	script[steps++].answer = answer;
}

#define ASKED(...)	((struct pvdma_frame){ __VA_ARGS__ })
#define ANSWER(...)	((struct pvdma_frame){ __VA_ARGS__ })

static u64 status(u32 class, u32 number)
{
	return class | number << 8;
}

static void live_host(struct pvdma_frame *frame);

void pvdma_transport_call(const struct pvdma_host *to, struct pvdma_frame *frame)
{
	EQUAL(to->port, PVDMA_PORT);
	if (live) {
		live_host(frame);
		return;
	}
	if (next == steps)
		fail(__LINE__, "a call nobody expected", frame->rax, 0);
	EQUAL(frame->rax, script[next].question.rax);
	EQUAL(frame->rdi, script[next].question.rdi);
	EQUAL(frame->rsi, script[next].question.rsi);
	EQUAL(frame->r8, script[next].question.r8);
	EQUAL(frame->r9, script[next].question.r9);
	EQUAL(frame->r10, script[next].question.r10);
	*frame = script[next++].answer;
}

void pvdma_transport_relax(void)
{
	relaxed++;
}

static struct pvdma_cpuid leaves[4];
static u32 leaves_at;

struct pvdma_cpuid pvdma_transport_cpuid(u32 leaf)
{
	/* past its leaves a processor repeats something else's */
	static const struct pvdma_cpuid noise = { 7, 0x12345678, 0x56502e41, 0x2e414d44 };

	if (leaves_at && leaf >= leaves_at && leaf < leaves_at + ARRAY_SIZE(leaves))
		return leaves[leaf - leaves_at];
	return noise;
}

static void leaves_of(u32 base)
{
	leaves_at = base;
	leaves[0] = (struct pvdma_cpuid){ base + 2, PVDMA_CPUID_SIGNATURE_EBX,
					  PVDMA_CPUID_SIGNATURE_ECX,
					  PVDMA_CPUID_SIGNATURE_EDX };
	leaves[1] = (struct pvdma_cpuid){ PVDMA_ABI_VERSION,
					  PVDMA_FEATURE_LIST | PVDMA_FEATURE_RELEASE,
					  0xabcd0000 | PVDMA_PORT, 100 };
	leaves[2] = (struct pvdma_cpuid){ 1000, 0, 0, 0 };
}

static const struct pvdma_host host = {
	.version = PVDMA_ABI_VERSION,
	.features = PVDMA_FEATURE_LIST | PVDMA_FEATURE_RELEASE | PVDMA_FEATURE_TABLE,
	.port = PVDMA_PORT,
	.list_entries = PVDMA_LIST_ENTRIES, .map_pages = PVDMA_MAP_PAGES_MAX,
};

static struct pvdma_counters counters;
static struct pvdma_entry page[PVDMA_LIST_ENTRIES];

#define PAGE_GPA	0x7000ull
#define RW		(PVDMA_MAP_READ | PVDMA_MAP_WRITE)

static void all_asked(int line)
{
	if (next != steps)
		fail(line, "calls made", next, steps);
}

static void discovers(void)
{
	struct pvdma_host found;

	EQUAL(pvdma_discover(&found), PVDMA_NO_HOST);

	leaves_of(PVDMA_CPUID_FIRST);
	EQUAL(pvdma_discover(&found), PVDMA_FOUND);
	EQUAL(found.port, PVDMA_PORT);
	EQUAL(found.list_entries, 100);
	EQUAL(found.map_pages, 1000);
	EQUAL(found.version, PVDMA_ABI_VERSION);

	/* behind another hypervisor's block, and the last place there is */
	leaves_of(PVDMA_CPUID_FIRST + 3 * PVDMA_CPUID_STEP);
	EQUAL(pvdma_discover(&found), PVDMA_FOUND);
	leaves_of(PVDMA_CPUID_LAST);
	EQUAL(pvdma_discover(&found), PVDMA_FOUND);
	leaves_of(PVDMA_CPUID_LAST + PVDMA_CPUID_STEP);
	EQUAL(pvdma_discover(&found), PVDMA_NO_HOST);
	leaves_of(PVDMA_CPUID_FIRST + 1);
	EQUAL(pvdma_discover(&found), PVDMA_NO_HOST);
}

static void discovery_keeps_limits(void)
{
	struct pvdma_host found;

	leaves_of(PVDMA_CPUID_FIRST);
	leaves[1].edx = 100000;
	leaves[2].eax = 0;
	EQUAL(pvdma_discover(&found), PVDMA_FOUND);
	EQUAL(found.list_entries, PVDMA_LIST_ENTRIES);
	EQUAL(found.map_pages, PVDMA_MAP_PAGES_MAX);

	/* no lists, and a block that ends before the limits */
	leaves[1].ebx = ~PVDMA_FEATURE_LIST;
	leaves[0].eax = PVDMA_CPUID_FIRST + 1;
	leaves[2].eax = 5;
	EQUAL(pvdma_discover(&found), PVDMA_FOUND);
	EQUAL(found.list_entries, 0);
	EQUAL(found.map_pages, PVDMA_MAP_PAGES_MAX);

	/* a block that ends before everything */
	leaves[0].eax = PVDMA_CPUID_FIRST;
	EQUAL(pvdma_discover(&found), PVDMA_NO_HOST);
}

static void refuses_another_major(void)
{
	struct pvdma_host found;

	leaves_of(PVDMA_CPUID_FIRST);
	leaves[1].eax = (PVDMA_ABI_MAJOR + 1) << 16;
	EQUAL(pvdma_discover(&found), PVDMA_OTHER_MAJOR);
	EQUAL(found.version >> 16, PVDMA_ABI_MAJOR + 1);
	EQUAL(found.port, 0);
	/* a newer minor is welcome */
	leaves[1].eax = PVDMA_ABI_VERSION + 7;
	EQUAL(pvdma_discover(&found), PVDMA_FOUND);
}

static void probes(void)
{
	struct pvdma_offer offer;

	step(ASKED(PVDMA_CALL_PROBE, .rdi = PVDMA_ABI_VERSION, .rsi = PAGE_GPA),
	     ANSWER(PVDMA_STATUS_OK, .rdi = 0x10003, .rsi = 5, .r8 = 0x201000,
		    .r9 = 1 << 20, .r10 = 9999));
	EQUAL(pvdma_probe(&host, &counters, PAGE_GPA, &offer), 0);
	EQUAL(offer.version, 0x10003);
	EQUAL(offer.features, 5);
	EQUAL(offer.page_sizes, 0x201000);
	EQUAL(offer.quota_bytes, 1 << 20);
	EQUAL(offer.iova_ranges, PVDMA_LIST_ENTRIES);
	EQUAL(counters.calls[PVDMA_CALL_PROBE], 1);
}

static void asks_for_devices(void)
{
	struct pvdma_assignment answer = { 0 };

	step(ASKED(PVDMA_CALL_IS_ASSIGNED, .rdi = 0x10208),
	     ANSWER(0, .rdi = 3, .rsi = PVDMA_POLICY_STRICT, .r8 = 39, .r9 = 65535,
		    .r10 = 1ull << 40));
	EQUAL(pvdma_is_assigned(&host, &counters, 0x10208, &answer), 0);
	EQUAL(answer.runs, 65535);
	EQUAL(answer.pinned_bytes, 1ull << 40);
	EQUAL(answer.handle, 3);
	EQUAL(answer.policy, PVDMA_POLICY_STRICT);
	EQUAL(answer.identity, false);
	EQUAL(answer.iova_bits, 39);

	step(ASKED(PVDMA_CALL_IS_ASSIGNED, .rdi = 8),
	     ANSWER(0, .rdi = 1, .rsi = PVDMA_POLICY_PINNED | PVDMA_DEVICE_IDENTITY));
	EQUAL(pvdma_is_assigned(&host, &counters, 8, &answer), 0);
	EQUAL(answer.policy, PVDMA_POLICY_PINNED);
	EQUAL(answer.identity, true);

	answer.handle = 77;
	step(ASKED(PVDMA_CALL_IS_ASSIGNED, .rdi = 9),
	     ANSWER(status(PVDMA_STATUS_INVALID, 38), .rdi = 5));
	EQUAL(pvdma_is_assigned(&host, &counters, 9, &answer), status(PVDMA_STATUS_INVALID, 38));
	EQUAL(answer.handle, 77);
	EQUAL(counters.errors[PVDMA_STATUS_INVALID], 1);
}

/*
 * A host of 1.0 has no release, and leaves alone the registers that 1.1 put the
 * device's limits into.
 */
static void gets_along_with_a_1_0_host(void)
{
	struct pvdma_assignment answer = { .runs = 5, .pinned_bytes = 6 };
	struct pvdma_released released = { 7, 8 };
	struct pvdma_host old;
	u64 iova = 0;

	leaves_of(PVDMA_CPUID_FIRST);
	leaves[1].eax = 0x10000;
	leaves[1].ebx = PVDMA_FEATURE_LIST;
	EQUAL(pvdma_discover(&old), PVDMA_FOUND);
	EQUAL(old.features & PVDMA_FEATURE_RELEASE, 0);

	/* asked with zeros, which come back */
	step(ASKED(PVDMA_CALL_IS_ASSIGNED, .rdi = 8, .r9 = 0, .r10 = 0),
	     ANSWER(0, .rdi = 1, .rsi = PVDMA_POLICY_STRICT, .r8 = 39, .r9 = 0, .r10 = 0));
	EQUAL(pvdma_is_assigned(&old, &counters, 8, &answer), 0);
	EQUAL(answer.runs, 0);
	EQUAL(answer.pinned_bytes, 0);
	EQUAL(pvdma_mapping_max(&old, &answer), 999 * 4096);

	step(ASKED(PVDMA_CALL_MAP, .rdi = 1, .rsi = 0x5000, .r8 = 16, .r9 = ~0ull, .r10 = RW),
	     ANSWER(0, .rdi = 0x9000));
	EQUAL(pvdma_map(&old, &counters, 1, 0x5000, 16, ~0ull, RW, &iova), 0);

	/* the call is not made, and nothing counts as taken back */
	EQUAL(pvdma_release(&old, &counters, 1, &released), PVDMA_STATUS_INVALID);
	EQUAL(released.mappings, 7);
	EQUAL(counters.calls[PVDMA_CALL_RELEASE], 0);
	EQUAL(counters.errors[PVDMA_STATUS_INVALID], 0);
	EQUAL(counters.outstanding, 1);
}

static void releases(void)
{
	struct pvdma_released released = { 0 };
	struct pvdma_frame question = ASKED(PVDMA_CALL_RELEASE, .rdi = 3);

	counters.outstanding = 9;
	step(question, ANSWER(status(PVDMA_STATUS_RETRY, 11), .rdi = 1, .rsi = 1));
	step(question, ANSWER(0, .rdi = 9, .rsi = 0xc000));
	EQUAL(pvdma_release(&host, &counters, 3, &released), 0);
	EQUAL(released.mappings, 9);
	EQUAL(released.bytes, 0xc000);
	EQUAL(counters.retries, 1);
	/* what it was is known to who holds all counters */
	EQUAL(counters.outstanding, 9);
	pvdma_count_released(&counters, 9, 12);
	EQUAL(counters.outstanding, 0);
	EQUAL(counters.pages_released, 12);
	EQUAL(counters.pages_unmapped, 0);

	step(question, ANSWER(status(PVDMA_STATUS_LIMIT, 71), .rdi = 4, .rsi = 0x4000));
	EQUAL(pvdma_release(&host, &counters, 3, &released), status(PVDMA_STATUS_LIMIT, 71));
	EQUAL(released.mappings, 9);
	EQUAL(counters.errors[PVDMA_STATUS_LIMIT], 1);
}

#define TABLE_PAGES	16u
#define PINNED		PVDMA_TABLE_PINNED
#define USED		PVDMA_TABLE_USED

static u32 entries[TABLE_PAGES];
static const struct pvdma_table table = { .entries = entries, .pages = TABLE_PAGES };

static void finds_the_table(void)
{
	const struct pvdma_host old = { .features = PVDMA_FEATURE_LIST };
	struct pvdma_table found = { 0 };

	step(ASKED(PVDMA_CALL_TABLE, .rdi = 3), ANSWER(0, .rdi = 0x100000000, .rsi = 0x20000));
	EQUAL(pvdma_find_table(&host, &counters, 3, false, &found), 0);
	EQUAL(found.gpa, 0x100000000);
	EQUAL(found.pages, 0x20000);

	step(ASKED(PVDMA_CALL_TABLE, .rdi = 3, .rsi = 1), ANSWER(status(PVDMA_STATUS_LIMIT, 71), .rdi = 9));
	EQUAL(pvdma_find_table(&host, &counters, 3, true, &found), status(PVDMA_STATUS_LIMIT, 71));
	EQUAL(found.gpa, 0x100000000);
	EQUAL(counters.errors[PVDMA_STATUS_LIMIT], 1);

	EQUAL(pvdma_find_table(&old, &counters, 3, true, &found), PVDMA_STATUS_INVALID);
}

static void counts_in_the_table(void)
{
	bool missing = false;
	u32 i;

	/* nothing is pinned: the host has to be called; every page that is touched counts */
	EQUAL(pvdma_table_count(&table, 0x1fff, 2, &missing), 0);
	EQUAL(missing, true);
	EQUAL(entries[1], 1);
	EQUAL(entries[2], 1);
	EQUAL(entries[3], 0);

	/* pinned, and the host is told that it is used */
	entries[1] |= PINNED;
	entries[2] |= PINNED | USED;
	missing = false;
	EQUAL(pvdma_table_count(&table, 0x1000, 0x2000, &missing), 0);
	EQUAL(missing, false);
	EQUAL(entries[1], PINNED | USED | 2);
	EQUAL(entries[2], PINNED | USED | 2);

	/* one of two */
	EQUAL(pvdma_table_count(&table, 0x2000, 0x1001, &missing), 0);
	EQUAL(missing, true);

	EQUAL(pvdma_table_uncount(&table, 0x2000, 0x1001), true);
	EQUAL(pvdma_table_uncount(&table, 0x1000, 0x2000), true);
	/* more than was mapped: what is counted stays so */
	EQUAL(pvdma_table_uncount(&table, 0x1000, 0x3000), false);
	EQUAL(entries[1], PINNED | USED | 1);
	EQUAL(pvdma_table_uncount(&table, 0x1010, 0), false);
	EQUAL(pvdma_table_uncount(&table, 0x1000, 0), false);
	EQUAL(entries[1], PINNED | USED | 1);
	EQUAL(pvdma_table_uncount(&table, 0x1fff, 2), true);
	EQUAL(entries[1], PINNED | USED);
	EQUAL(entries[2], PINNED | USED);
	EQUAL(entries[3], 0);

	/* nor is anything taken from the bits beside a count of 0 */
	EQUAL(pvdma_table_uncount(&table, 0x1000, 0x1000), false);
	EQUAL(entries[1], PINNED | USED);
	EQUAL(entries[3], 0);
	for (i = 4; i < TABLE_PAGES; i++)
		EQUAL(entries[i], 0);
}

static void the_table_has_an_end(void)
{
	bool missing = false;
	u32 i;

	EQUAL(pvdma_table_count(&table, (TABLE_PAGES - 1) * 4096ull, 4096, &missing), 0);
	EQUAL(pvdma_table_count(&table, (TABLE_PAGES - 1) * 4096ull, 4097, &missing),
	      PVDMA_STATUS_INVALID);
	EQUAL(pvdma_table_count(&table, TABLE_PAGES * 4096ull, 1, &missing), PVDMA_STATUS_INVALID);
	EQUAL(pvdma_table_count(&table, ~0ull, 1, &missing), PVDMA_STATUS_INVALID);
	EQUAL(pvdma_table_count(&table, 0, ~0ull, &missing), PVDMA_STATUS_INVALID);
	EQUAL(pvdma_table_count(&table, 0x1000, 0, &missing), PVDMA_STATUS_INVALID);
	EQUAL(pvdma_table_uncount(&table, (TABLE_PAGES - 1) * 4096ull, 4097), false);
	EQUAL(pvdma_table_uncount(&table, (TABLE_PAGES - 1) * 4096ull, 4096), true);
	for (i = 0; i < TABLE_PAGES; i++)
		EQUAL(entries[i], 0);
}

static void one_page_is_counted_in_the_usual_case_only(void)
{
	/* what an entry holds, and whether a map of it needs to look further */
	static const struct {
		u32 entry;
		bool usual;
	} cases[] = {
		{ PINNED | USED, true },
		{ (PINNED | USED) + 1, true },
		{ (PINNED | USED) + PVDMA_TABLE_COUNT_MAX - 1, true },
		{ (PINNED | USED) + PVDMA_TABLE_COUNT_MAX, false },
		{ PINNED + PVDMA_TABLE_COUNT_MAX, false },
		{ USED, false },
		{ USED + 3, false },
		{ 0, false },
	};
	unsigned int i;

	for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		entries[2] = cases[i].entry;
		EQUAL(pvdma_table_count_one(&table, 0x2000, 4096), cases[i].usual);
		EQUAL(entries[2], cases[i].entry + cases[i].usual);
	}
	/* the host is told that it is used */
	entries[2] = PINNED;
	EQUAL(pvdma_table_count_one(&table, 0x2000, 4096), true);
	EQUAL(entries[2], (PINNED | USED) + 1);

	entries[2] = PINNED | USED;
	EQUAL(pvdma_table_count_one(&table, 0x2fff, 1), true);
	EQUAL(pvdma_table_count_one(&table, 0x2ffe, 2), true);
	EQUAL(pvdma_table_count_one(&table, 0x2fff, 2), false);
	EQUAL(pvdma_table_count_one(&table, 0x2000, 4097), false);
	EQUAL(pvdma_table_count_one(&table, 0x2000, 0), false);
	EQUAL(pvdma_table_count_one(&table, 0x2001, ~0ull), false);
	EQUAL(entries[2], (PINNED | USED) + 2);
	EQUAL(entries[3], 0);
	EQUAL(pvdma_table_uncount_one(&table, 0x2fff, 2), false);
	EQUAL(pvdma_table_uncount_one(&table, 0x2000, 0), false);
	EQUAL(pvdma_table_uncount_one(&table, 0x2ffe, 2), true);
	EQUAL(pvdma_table_uncount_one(&table, 0x2000, 4096), true);
	EQUAL(pvdma_table_uncount_one(&table, 0x2000, 4096), false);
	EQUAL(entries[2], PINNED | USED);
	entries[TABLE_PAGES - 1] = PINNED | USED;
	EQUAL(pvdma_table_count_one(&table, (TABLE_PAGES - 1) * 4096ull, 4096), true);
	EQUAL(pvdma_table_count_one(&table, TABLE_PAGES * 4096ull, 1), false);
	EQUAL(pvdma_table_count_one(&table, ~0ull, 1), false);
	EQUAL(pvdma_table_uncount_one(&table, TABLE_PAGES * 4096ull, 1), false);
}

static void counts_do_not_overflow(void)
{
	bool missing = false;

	entries[4] = PINNED | USED;
	entries[5] = PINNED | USED | PVDMA_TABLE_COUNT_MAX;
	EQUAL(pvdma_table_count(&table, 0x4000, 0x3000, &missing), PVDMA_STATUS_LIMIT);
	EQUAL(missing, false);
	EQUAL(entries[4], PINNED | USED);
	EQUAL(entries[5], PINNED | USED | PVDMA_TABLE_COUNT_MAX);
	EQUAL(entries[6], 0);
	entries[5]--;
	EQUAL(pvdma_table_count(&table, 0x5000, 1, &missing), 0);
}

static void maps_what_is_counted(void)
{
	struct pvdma_list list;

	pvdma_list_start(&list, page, PVDMA_LIST_ENTRIES, PVDMA_MAP_PAGES_MAX, ~0ull);
	pvdma_list_add(&list, 0x5010, 16);
	step(ASKED(PVDMA_CALL_MAP, .rdi = 1, .rsi = 0x5010, .r8 = 16, .r9 = ~0ull,
		   .r10 = RW | PVDMA_MAP_COUNTED), ANSWER(0, .rdi = 0x5010));
	EQUAL(pvdma_map_counted(&host, &counters, 1, &list, PAGE_GPA, ~0ull, RW), 0);

	pvdma_list_add(&list, 0x9000, 4096);
	step(ASKED(PVDMA_CALL_MAP_LIST, .rdi = 1, .rsi = PAGE_GPA, .r8 = 2, .r9 = ~0ull,
		   .r10 = RW | PVDMA_MAP_COUNTED),
	     ANSWER(status(PVDMA_STATUS_RETRY, 11), .rsi = 0));
	step(ASKED(PVDMA_CALL_MAP_LIST, .rdi = 1, .rsi = PAGE_GPA, .r8 = 2, .r9 = ~0ull,
		   .r10 = RW | PVDMA_MAP_COUNTED),
	     ANSWER(status(PVDMA_STATUS_LIMIT, 28), .rsi = 1));
	EQUAL(pvdma_map_counted(&host, &counters, 1, &list, PAGE_GPA, ~0ull, RW),
	      status(PVDMA_STATUS_LIMIT, 28));
	EQUAL(counters.retries, 1);
	EQUAL(counters.errors[PVDMA_STATUS_LIMIT], 1);
	/* the caller counts mappings: most need no call */
	EQUAL(counters.outstanding, 0);
	EQUAL(counters.maps, 0);
}

/* A mapping of the size offered, however scattered, beside half of all and the pools. */
static void mappings_fit_the_limits(void)
{
	static const struct { u64 runs, pinned_bytes, pages; } cases[] = {
		{ 0, 0, PVDMA_MAP_PAGES_MAX - 1 },
		{ 0, 1ull << 40, PVDMA_MAP_PAGES_MAX - 1 },
		{ ~0ull, ~0ull, PVDMA_MAP_PAGES_MAX - 1 },
		{ 65535, 0, 16382 },
		{ 65535, 64 << 20, 4095 },
		{ 65535, 1 << 20, 63 },
		{ 90, 0, 21 },
		{ 50, 1 << 20, 11 },
		{ 30, 0, 6 },
		{ 30, 64 << 10, 3 },
		{ 0, 1, 1 },
		{ 1, 0, 1 },
	};
	struct pvdma_assignment device = { 0 };
	u32 i;
	u64 n;

	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		device.runs = cases[i].runs;
		device.pinned_bytes = cases[i].pinned_bytes;
		EQUAL(pvdma_mapping_max(&host, &device), cases[i].pages * 4096);
	}
	device.pinned_bytes = 0;
	for (n = 8; n < 3000; n++) {
		u64 standing, most;

		device.runs = n;
		most = pvdma_pages(4095, pvdma_mapping_max(&host, &device));
		for (standing = 0; standing <= n / 2; standing++) {
			u64 pools = (n - standing) / 2;

			EQUAL(most <= n - standing - pools, true);
			EQUAL(most + 1 <= n - standing, true);	/* the first, and its list */
		}
	}
}

static void maps_and_unmaps(void)
{
	u64 iova = 0;

	step(ASKED(PVDMA_CALL_MAP, .rdi = 2, .rsi = 0x1ffc, .r8 = 0x1008,
		   .r9 = 0xffffffff, .r10 = RW | PVDMA_MAP_ALIGN),
	     ANSWER(0, .rdi = 0x80000ffc));
	EQUAL(pvdma_map(&host, &counters, 2, 0x1ffc, 0x1008, 0xffffffff,
			RW | PVDMA_MAP_ALIGN, &iova), 0);
	EQUAL(iova, 0x80000ffc);
	EQUAL(counters.maps, 1);
	EQUAL(counters.pages_mapped, 3);
	EQUAL(counters.outstanding, 1);

	step(ASKED(PVDMA_CALL_UNMAP, .rdi = 2, .rsi = 0x80000ffc, .r8 = 0x1008),
	     ANSWER(0, .rdi = 0x3000));
	EQUAL(pvdma_unmap(&host, &counters, 2, iova, 0x1008), 0);
	EQUAL(counters.unmaps, 1);
	EQUAL(counters.pages_unmapped, 3);
	EQUAL(counters.outstanding, 0);
}

/* The question is put again as it was, whatever the answer left in registers. */
static void repeats_when_told(void)
{
	struct pvdma_frame question = ASKED(PVDMA_CALL_MAP, .rdi = 1, .rsi = 0x5000,
					    .r8 = 16, .r9 = ~0ull, .r10 = RW);
	struct pvdma_frame clobbered = ANSWER(status(PVDMA_STATUS_RETRY, 4), 1, 2, 3, 4, 5);
	u64 iova = 0;
	u32 i;

	for (i = 0; i < PVDMA_MAP_TRIES - 1; i++)
		step(question, clobbered);
	step(question, ANSWER(0, .rdi = 0x9000));
	EQUAL(pvdma_map(&host, &counters, 1, 0x5000, 16, ~0ull, RW, &iova), 0);
	EQUAL(iova, 0x9000);
	EQUAL(counters.retries, PVDMA_MAP_TRIES - 1);
	EQUAL(relaxed, PVDMA_MAP_TRIES - 1);
	EQUAL(counters.errors[PVDMA_STATUS_RETRY], 0);

	for (i = 0; i < PVDMA_MAP_TRIES; i++)
		step(question, clobbered);
	iova = 42;
	EQUAL(pvdma_map(&host, &counters, 1, 0x5000, 16, ~0ull, RW, &iova),
	      status(PVDMA_STATUS_RETRY, 4));
	EQUAL(iova, 42);
	EQUAL(counters.errors[PVDMA_STATUS_RETRY], 1);
	EQUAL(counters.maps, 1);
	EQUAL(counters.calls[PVDMA_CALL_MAP], 2 * PVDMA_MAP_TRIES);

	/* an unmap has more patience */
	for (i = 0; i < PVDMA_UNMAP_TRIES; i++)
		step(ASKED(PVDMA_CALL_UNMAP, .rdi = 1, .rsi = 0x9000, .r8 = 16), clobbered);
	EQUAL(counters.stuck, 0);
	EQUAL(PVDMA_STATUS_CLASS(pvdma_unmap(&host, &counters, 1, 0x9000, 16)),
	      PVDMA_STATUS_RETRY);
	EQUAL(counters.outstanding, 1);
	EQUAL(counters.stuck, 1);
}

static void failures_are_counted_by_class(void)
{
	static const struct { u32 class, counted; } cases[] = {
		{ PVDMA_STATUS_LIMIT, PVDMA_STATUS_LIMIT },
		{ PVDMA_STATUS_INVALID, PVDMA_STATUS_INVALID },
		{ PVDMA_STATUS_GONE, PVDMA_STATUS_GONE },
		{ 200, PVDMA_STATUS_INVALID },
	};
	u64 iova = 42;
	u32 i;

	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		struct pvdma_counters before = counters;

		step(ASKED(PVDMA_CALL_MAP, .rdi = 1, .rsi = 0x5000, .r8 = 16, .r9 = ~0ull,
			   .r10 = RW), ANSWER(status(cases[i].class, 28), .rdi = 0x1000));
		EQUAL(pvdma_map(&host, &counters, 1, 0x5000, 16, ~0ull, RW, &iova),
		      status(cases[i].class, 28));
		EQUAL(counters.errors[cases[i].counted], before.errors[cases[i].counted] + 1);
	}
	EQUAL(iova, 42);
	EQUAL(counters.maps, 0);
	EQUAL(counters.outstanding, 0);
}

/* With the device went its mappings: none is outstanding, and none was unmapped. */
static void mappings_go_with_their_device(void)
{
	u32 failed = 9;

	counters.outstanding = 4;
	step(ASKED(PVDMA_CALL_UNMAP, .rdi = 1, .rsi = 0x9ff0, .r8 = 32),
	     ANSWER(status(PVDMA_STATUS_GONE, 19), .rdi = 0));
	EQUAL(pvdma_unmap(&host, &counters, 1, 0x9ff0, 32), status(PVDMA_STATUS_GONE, 19));
	EQUAL(counters.outstanding, 3);
	EQUAL(counters.pages_released, 2);

	page[0] = page[1] = page[2] = (struct pvdma_entry){ 0x10000, 0x3000 };
	step(ASKED(PVDMA_CALL_UNMAP_LIST, .rdi = 1, .rsi = PAGE_GPA, .r8 = 3),
	     ANSWER(status(PVDMA_STATUS_GONE, 19), .rsi = 1));
	step(ASKED(PVDMA_CALL_UNMAP_LIST, .rdi = 1, .rsi = PAGE_GPA, .r8 = 1),
	     ANSWER(status(PVDMA_STATUS_GONE, 19), .rsi = 0));
	EQUAL(PVDMA_STATUS_CLASS(pvdma_unmap_list(&host, &counters, 1, page, PAGE_GPA, 3,
						  &failed)), PVDMA_STATUS_GONE);
	EQUAL(failed, 0);
	EQUAL(counters.outstanding, 0);
	EQUAL(counters.pages_released, 8);
	EQUAL(counters.pages_unmapped, 3);
	EQUAL(counters.unmaps, 0);
	EQUAL(counters.errors[PVDMA_STATUS_GONE], 3);
}

/* Unmapped twice, or in another size than mapped: refused, and nothing changes. */
static void refused_unmaps_change_nothing(void)
{
	u32 failed = 9;

	counters.outstanding = 1;
	step(ASKED(PVDMA_CALL_UNMAP, .rdi = 1, .rsi = 0x9000, .r8 = 0x2000),
	     ANSWER(status(PVDMA_STATUS_INVALID, 116), .rdi = 0));
	EQUAL(PVDMA_STATUS_CLASS(pvdma_unmap(&host, &counters, 1, 0x9000, 0x2000)),
	      PVDMA_STATUS_INVALID);
	page[0] = page[1] = (struct pvdma_entry){ 0x9000, 0x1000 };
	step(ASKED(PVDMA_CALL_UNMAP_LIST, .rdi = 1, .rsi = PAGE_GPA, .r8 = 2),
	     ANSWER(status(PVDMA_STATUS_INVALID, 116), .rsi = 1));
	EQUAL(PVDMA_STATUS_CLASS(pvdma_unmap_list(&host, &counters, 1, page, PAGE_GPA, 2,
						  &failed)), PVDMA_STATUS_INVALID);
	EQUAL(failed, 1);
	EQUAL(counters.stuck, 0);
	EQUAL(counters.errors[PVDMA_STATUS_INVALID], 2);
	EQUAL(counters.outstanding, 0);
	EQUAL(counters.pages_unmapped, 1);
	EQUAL(counters.pages_released, 0);
}

/* An address the device cannot emit is no mapping, and none may be left. */
static void unusable_answers_are_undone(void)
{
	static const struct { u64 gpa, bytes, iova_max, iova; bool good; } cases[] = {
		{ 0x5010, 16, ~0ull, 0x9020, false },
		{ 0x5010, 16, 0xfffffff, 0x10000010, false },
		{ 0x5000, 0x1001, 0xfffffff, 0xffff000, false },
		{ 0x5000, 0x1000, 0xfffffff, 0xffff000, true },
		{ 0x5000, 0x1000, ~0ull, ~0ull - 0xfff, true },
	};
	u64 iova = 42;
	u32 i;

	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		u32 got;

		step(ASKED(PVDMA_CALL_MAP, .rdi = 1, .rsi = cases[i].gpa, .r8 = cases[i].bytes,
			   .r9 = cases[i].iova_max, .r10 = RW),
		     ANSWER(0, .rdi = cases[i].iova));
		if (!cases[i].good)
			step(ASKED(PVDMA_CALL_UNMAP, .rdi = 1, .rsi = cases[i].iova,
				   .r8 = cases[i].bytes), ANSWER(0, .rdi = 0x1000));
		got = pvdma_map(&host, &counters, 1, cases[i].gpa, cases[i].bytes,
				cases[i].iova_max, RW, &iova);
		if (cases[i].good) {
			EQUAL(got, PVDMA_STATUS_OK);
			EQUAL(iova, cases[i].iova);
		} else {
			EQUAL(got, PVDMA_STATUS_INVALID);
			EQUAL(iova, 42);
		}
		iova = 42;
		all_asked(__LINE__);
	}
	EQUAL(counters.outstanding, 2);
	EQUAL(counters.errors[PVDMA_STATUS_INVALID], 3);
}

static void counts_pages(void)
{
	EQUAL(pvdma_pages(0, 1), 1);
	EQUAL(pvdma_pages(0xfff, 1), 1);
	EQUAL(pvdma_pages(0xfff, 2), 2);
	EQUAL(pvdma_pages(0, 0x1000), 1);
	EQUAL(pvdma_pages(1, 0x1000), 2);
	EQUAL(pvdma_pages(0x12345fff, 0x2002), 4);
	EQUAL(pvdma_pages(0, 1ull << 32), 1 << 20);
}

static void builds_lists(void)
{
	struct pvdma_list list;
	u32 i;

	pvdma_list_start(&list, page, 3, 100, ~0ull);
	EQUAL(pvdma_list_add(&list, 0x1234, 8), true);
	EQUAL(pvdma_list_add(&list, 0x2fff, 2), true);
	EQUAL(pvdma_list_add(&list, 0x9000, 0x1000), true);
	EQUAL(pvdma_list_add(&list, 0xa000, 1), false);
	EQUAL(list.count, 3);
	EQUAL(list.pages, 4);
	EQUAL(list.bytes, 0x100a);
	EQUAL(page[1].address, 0x2fff);
	EQUAL(page[1].bytes, 2);
	EQUAL(page[3].bytes, 0);

	/* by pages: what alone is too much is the host's to refuse */
	pvdma_list_start(&list, page, 256, 5, ~0ull);
	EQUAL(pvdma_list_add(&list, 0, 9 * 4096), true);
	EQUAL(pvdma_list_add(&list, 0, 1), false);
	pvdma_list_start(&list, page, 256, 5, ~0ull);
	EQUAL(pvdma_list_add(&list, 0, 3 * 4096), true);
	EQUAL(pvdma_list_add(&list, 1, 2 * 4096), false);
	EQUAL(pvdma_list_add(&list, 0, 2 * 4096), true);
	EQUAL(pvdma_list_add(&list, 0, 1), false);

	/* a full page of entries and not one more */
	pvdma_list_start(&list, page, PVDMA_LIST_ENTRIES, 1000, ~0ull);
	for (i = 0; i < PVDMA_LIST_ENTRIES; i++)
		EQUAL(pvdma_list_add(&list, i << 12, 4096), true);
	EQUAL(pvdma_list_add(&list, 0, 4096), false);
}

static void lists_respect_boundaries(void)
{
	struct pvdma_list list;

	pvdma_list_start(&list, NULL, 256, 1000, 0xffff);
	EQUAL(pvdma_list_add(&list, 0, 15 * 4096), true);
	/* would lie on the 64 KiB line, ends at it, begins at it */
	EQUAL(pvdma_list_add(&list, 0, 2 * 4096), false);
	EQUAL(pvdma_list_add(&list, 0x800, 0x900), false);
	EQUAL(pvdma_list_add(&list, 0x800, 0x800), true);
	EQUAL(pvdma_list_add(&list, 0, 16 * 4096), true);
	EQUAL(list.pages, 32);
	/* one that crosses alone is taken when it comes first */
	pvdma_list_start(&list, NULL, 256, 1000, 0xffff);
	EQUAL(pvdma_list_add(&list, 0, 17 * 4096), true);
}

static void maps_lists(void)
{
	struct pvdma_list list;
	u64 iova = 0;

	pvdma_list_start(&list, page, 256, 1000, ~0ull);
	pvdma_list_add(&list, 0x1800, 0x800);
	pvdma_list_add(&list, 0x5000, 0x1000);
	step(ASKED(PVDMA_CALL_MAP_LIST, .rdi = 4, .rsi = PAGE_GPA, .r8 = 2, .r9 = 0xffffffff,
		   .r10 = PVDMA_MAP_READ), ANSWER(0, .rdi = 0x30000, .rsi = 2));
	EQUAL(pvdma_map_list(&host, &counters, 4, &list, PAGE_GPA, 0xffffffff,
			     PVDMA_MAP_READ, &iova), 0);
	EQUAL(iova, 0x30000);
	EQUAL(counters.map_lists, 1);
	EQUAL(counters.pages_mapped, 2);
	EQUAL(counters.outstanding, 1);

	/* refused: nothing is mapped and nothing counted */
	step(ASKED(PVDMA_CALL_MAP_LIST, .rdi = 4, .rsi = PAGE_GPA, .r8 = 2, .r9 = 0xffffffff,
		   .r10 = PVDMA_MAP_READ),
	     ANSWER(status(PVDMA_STATUS_LIMIT, 28), .rdi = 0x1000, .rsi = 1));
	EQUAL(PVDMA_STATUS_CLASS(pvdma_map_list(&host, &counters, 4, &list, PAGE_GPA,
						0xffffffff, PVDMA_MAP_READ, &iova)),
	      PVDMA_STATUS_LIMIT);
	EQUAL(iova, 0x30000);
	EQUAL(counters.outstanding, 1);

	/* ok, and yet not all of it: undone */
	step(ASKED(PVDMA_CALL_MAP_LIST, .rdi = 4, .rsi = PAGE_GPA, .r8 = 2, .r9 = 0xffffffff,
		   .r10 = PVDMA_MAP_READ), ANSWER(0, .rdi = 0x40000, .rsi = 1));
	step(ASKED(PVDMA_CALL_UNMAP, .rdi = 4, .rsi = 0x40000, .r8 = 0x2000),
	     ANSWER(0, .rdi = 0x2000));
	EQUAL(pvdma_map_list(&host, &counters, 4, &list, PAGE_GPA, 0xffffffff,
			     PVDMA_MAP_READ, &iova), PVDMA_STATUS_INVALID);
	EQUAL(iova, 0x30000);

	/* past what the device can emit: undone, the whole range */
	step(ASKED(PVDMA_CALL_MAP_LIST, .rdi = 4, .rsi = PAGE_GPA, .r8 = 2, .r9 = 0xffffffff,
		   .r10 = PVDMA_MAP_READ), ANSWER(0, .rdi = 0xfffff000, .rsi = 2));
	step(ASKED(PVDMA_CALL_UNMAP, .rdi = 4, .rsi = 0xfffff000, .r8 = 0x2000),
	     ANSWER(0, .rdi = 0x2000));
	EQUAL(pvdma_map_list(&host, &counters, 4, &list, PAGE_GPA, 0xffffffff,
			     PVDMA_MAP_READ, &iova), PVDMA_STATUS_INVALID);
	EQUAL(iova, 0x30000);
	EQUAL(counters.outstanding, 1);
}

static void a_list_of_one_is_a_map(void)
{
	struct pvdma_list list;
	u64 iova = 0;

	pvdma_list_start(&list, page, 256, 1000, ~0ull);
	pvdma_list_add(&list, 0x1834, 0x800);
	step(ASKED(PVDMA_CALL_MAP, .rdi = 4, .rsi = 0x1834, .r8 = 0x800, .r9 = ~0ull,
		   .r10 = RW), ANSWER(0, .rdi = 0x30834));
	EQUAL(pvdma_map_list(&host, &counters, 4, &list, PAGE_GPA, ~0ull, RW, &iova), 0);
	EQUAL(iova, 0x30000);
	EQUAL(counters.maps, 1);
	EQUAL(counters.map_lists, 0);
}

static void fill_unmaps(u32 n)
{
	u32 i;

	counters.outstanding = n;
	for (i = 0; i < n; i++) {
		page[i].address = 0x10000 * (i + 1);
		page[i].bytes = 0x1000 * (i + 1);
	}
}

#define UNMAP_LIST(n)	ASKED(PVDMA_CALL_UNMAP_LIST, .rdi = 6, .rsi = PAGE_GPA, .r8 = (n))

static void unmaps_lists(void)
{
	u32 failed = 9;

	fill_unmaps(4);
	step(UNMAP_LIST(4), ANSWER(0, .rdi = 0xa000, .rsi = 4));
	EQUAL(pvdma_unmap_list(&host, &counters, 6, page, PAGE_GPA, 4, &failed), 0);
	EQUAL(failed, 0);
	EQUAL(counters.outstanding, 0);
	EQUAL(counters.pages_unmapped, 10);
	EQUAL(counters.unmap_lists, 1);
}

static void unmap_list_goes_on_where_it_stopped(void)
{
	u32 failed = 9;

	fill_unmaps(5);
	step(UNMAP_LIST(5), ANSWER(status(PVDMA_STATUS_RETRY, 11), .rsi = 2));
	step(UNMAP_LIST(3), ANSWER(0, .rsi = 3));
	EQUAL(pvdma_unmap_list(&host, &counters, 6, page, PAGE_GPA, 5, &failed), 0);
	EQUAL(failed, 0);
	EQUAL(page[0].address, 0x30000);
	EQUAL(counters.outstanding, 0);
	EQUAL(counters.pages_unmapped, 15);
	EQUAL(counters.retries, 1);
}

static void unmap_list_steps_over_failures(void)
{
	u32 failed = 9;

	fill_unmaps(5);
	step(UNMAP_LIST(5), ANSWER(status(PVDMA_STATUS_INVALID, 22), .rsi = 1));
	step(UNMAP_LIST(3), ANSWER(status(PVDMA_STATUS_LIMIT, 12), .rsi = 2));
	EQUAL(pvdma_unmap_list(&host, &counters, 6, page, PAGE_GPA, 5, &failed),
	      status(PVDMA_STATUS_INVALID, 22));
	EQUAL(failed, 2);
	EQUAL(counters.outstanding, 2);
	EQUAL(counters.stuck, 1);	/* one of them; the other was a mistake */
	EQUAL(counters.errors[PVDMA_STATUS_INVALID], 1);
	EQUAL(counters.errors[PVDMA_STATUS_LIMIT], 1);
	all_asked(__LINE__);

	/* ok that was not all, and more than there were, are a host's mistakes */
	fill_unmaps(2);
	step(UNMAP_LIST(2), ANSWER(0, .rsi = 1));
	EQUAL(pvdma_unmap_list(&host, &counters, 6, page, PAGE_GPA, 2, &failed),
	      PVDMA_STATUS_INVALID);
	EQUAL(failed, 1);
	fill_unmaps(2);
	step(UNMAP_LIST(2), ANSWER(0, .rsi = 7));
	EQUAL(pvdma_unmap_list(&host, &counters, 6, page, PAGE_GPA, 2, &failed), 0);
	EQUAL(failed, 0);
}

static void joins_segments(void)
{
	struct pvdma_segment s = { 0x1f000, 0x1000 };

	EQUAL(pvdma_segment_join(&s, 0x20001, 16, ~0u, ~0ull), false);
	EQUAL(pvdma_segment_join(&s, 0x21000, 16, ~0u, ~0ull), false);
	EQUAL(pvdma_segment_join(&s, 0x20000, 16, 0x100f, ~0ull), false);
	EQUAL(pvdma_segment_join(&s, 0x20000, 16, 0x800, ~0ull), false);
	EQUAL(pvdma_segment_join(&s, 0x20000, 16, ~0u, 0xffff), false);
	EQUAL(s.bytes, 0x1000);
	EQUAL(pvdma_segment_join(&s, 0x20000, 16, 0x1010, 0x3ffff), true);
	EQUAL(s.bytes, 0x1010);
	EQUAL(s.iova, 0x1f000);
}

/* For the last test: a host with an allocator, and what it has mapped. */
static struct { u64 base, pages; bool live; } ranges[4096];
static u32 range_count;
static u64 top = 0x100000;

static void live_host(struct pvdma_frame *frame)
{
	u64 pages = 0, align = 4096;
	u32 i;

	if (frame->rax == PVDMA_CALL_UNMAP) {
		for (i = 0; i < range_count; i++) {
			if (ranges[i].live && ranges[i].base == (frame->rsi & ~0xfffull)) {
				EQUAL(pvdma_pages(frame->rsi, frame->r8), ranges[i].pages);
				ranges[i].live = false;
				frame->rax = 0;
				return;
			}
		}
		fail(__LINE__, "unmap of what is not mapped", frame->rsi, 0);
	}
	if (frame->rax == PVDMA_CALL_MAP) {
		pages = pvdma_pages(frame->rsi, frame->r8);
	} else {
		EQUAL(frame->rax, PVDMA_CALL_MAP_LIST);
		for (i = 0; i < frame->r8; i++)
			pages += pvdma_pages(page[i].address, page[i].bytes);
	}
	while (align < pages << 12)
		align <<= 1;
	top = (top + align - 1) & ~(align - 1);
	ranges[range_count].base = top;
	ranges[range_count].pages = pages;
	ranges[range_count++].live = true;
	frame->rdi = top | (frame->rax == PVDMA_CALL_MAP ? frame->rsi & 0xfff : 0);
	frame->rsi = frame->r8;
	frame->rax = 0;
	top += (pages + 1) << 12;
}

static u64 random_state = 88172645463325252ull;

static u32 random_below(u32 n)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state % n;
}

/*
 * Random lists as a map_sg makes them: no entry crosses a boundary it does not
 * cross by itself, no segment is too long, and the ranges found again without the
 * call page are those that were mapped.
 */
static void random_lists_come_back(void)
{
	static const u64 boundaries[] = { 0xffff, 0x1ffff, 0xffffffff, ~0ull };
	u32 round, i;

	live = true;
	for (round = 0; round < 300; round++) {
		u64 boundary = boundaries[random_below(ARRAY_SIZE(boundaries))];
		u32 most = 1 + random_below(40), n = 1 + random_below(120);
		u64 gpa[120], bytes[120], bases[120];
		struct pvdma_list list;
		u32 at = 0, found = 0, again = 0;

		for (i = 0; i < n; i++) {
			gpa[i] = (u64)random_below(1 << 20) << 12;
			gpa[i] += random_below(3) ? 0 : random_below(4096);
			bytes[i] = random_below(2) ? 4096 : 1 + random_below(20000);
		}
		range_count = 0;
		while (at < n) {
			struct pvdma_segment segment = { 0, 0 };
			u64 cursor;
			u32 first = at;

			pvdma_list_start(&list, page, most, 64, boundary);
			while (at < n && pvdma_list_add(&list, gpa[at], bytes[at]))
				at++;
			EQUAL(pvdma_map_list(&host, &counters, 1, &list, PAGE_GPA, ~0ull,
					     RW | PVDMA_MAP_ALIGN, &cursor), 0);
			bases[found++] = cursor;
			for (i = first; i < at; i++) {
				u64 iova = pvdma_place(&cursor, gpa[i], bytes[i]);
				u64 last = iova + bytes[i] - 1;

				EQUAL(iova & 0xfff, gpa[i] & 0xfff);
				if (i > first)
					EQUAL((iova ^ last) & ~boundary, 0);
				if (i == first ||
				    !pvdma_segment_join(&segment, iova, bytes[i], 65536,
							boundary)) {
					segment.iova = iova;
					segment.bytes = bytes[i];
				} else {
					EQUAL((segment.iova ^ last) & ~boundary, 0);
					EQUAL(segment.bytes <= 65536, true);
				}
			}
			EQUAL(cursor - bases[found - 1], list.pages << 12);
		}
		for (at = 0; at < n; again++) {
			pvdma_list_start(&list, NULL, most, 64, boundary);
			while (at < n && pvdma_list_add(&list, gpa[at], bytes[at]))
				at++;
			EQUAL(pvdma_unmap(&host, &counters, 1, bases[again],
					  list.pages << 12), 0);
		}
		EQUAL(again, found);
		for (i = 0; i < range_count; i++)
			EQUAL(ranges[i].live, false);
		EQUAL(counters.outstanding, 0);
		EQUAL(counters.pages_mapped, counters.pages_unmapped);
	}
}

/* Policy lazy's books. */
static struct pvdma_lazy lazy;

static void idle_mappings_are_used_again(void)
{
	struct pvdma_entry out[4];
	u64 iova = 0;

	memset(&lazy, 0xff, sizeof(lazy));
	pvdma_lazy_start(&lazy);
	pvdma_lazy_made(&lazy, 0x5010, 100, RW, 0x70010);
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5010, 100, RW, ~0ull, &iova), false);
	EQUAL(pvdma_lazy_take(&lazy, out, 4, 9), 0);
	EQUAL(pvdma_lazy_idle(&lazy, 0x70010, 100, 7), PVDMA_IDLE);
	EQUAL(lazy.idle, 1);

	/* another place, length, right, or a device that cannot emit the address */
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5000, 100, RW, ~0ull, &iova), false);
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5010, 101, RW, ~0ull, &iova), false);
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5010, 100, PVDMA_MAP_READ, ~0ull, &iova), false);
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5010, 100, RW, 0x70010 + 98, &iova), false);
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5010, 100, RW, 0x6ffff, &iova), false);
	EQUAL(iova, 0);
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5010, 100, RW, 0x70010 + 99, &iova), true);
	EQUAL(iova, 0x70010);
	EQUAL(lazy.idle, 0);
	/* it is one mapping, so it is one user's */
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5010, 100, RW, ~0ull, &iova), false);
	EQUAL(pvdma_lazy_idle(&lazy, 0x70010, 100, 8), PVDMA_IDLE);
	EQUAL(pvdma_lazy_take(&lazy, out, 4, 7), 0);
	EQUAL(pvdma_lazy_take(&lazy, out, 4, 8), 1);
	EQUAL(out[0].address, 0x70010);
	EQUAL(out[0].bytes, 100);
	EQUAL(pvdma_lazy_idle(&lazy, 0x70010, 100, 8), PVDMA_NOT_KNOWN);
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5010, 100, RW, ~0ull, &iova), false);
}

static void unmaps_that_are_wrong_are_seen(void)
{
	struct pvdma_entry out[1];
	u64 iova;

	pvdma_lazy_start(&lazy);
	pvdma_lazy_made(&lazy, 0x5000, 4096, RW, 0x70000);
	EQUAL(pvdma_lazy_idle(&lazy, 0x70000, 4097, 0), PVDMA_NOT_KNOWN);
	EQUAL(pvdma_lazy_idle(&lazy, 0x70001, 4096, 0), PVDMA_NOT_KNOWN);
	EQUAL(pvdma_lazy_idle(&lazy, 0x71000, 4096, 0), PVDMA_NOT_KNOWN);
	EQUAL(pvdma_lazy_idle(&lazy, 0x70000, 4096, 0), PVDMA_IDLE);
	EQUAL(pvdma_lazy_idle(&lazy, 0x70000, 4096, 0), PVDMA_IDLE_ALREADY);
	EQUAL(pvdma_lazy_idle(&lazy, 0x70000, 17, 0), PVDMA_IDLE_ALREADY);
	EQUAL(lazy.idle, 1);
	/* the host gave its address away, so what is known of it is old */
	pvdma_lazy_made(&lazy, 0x9010, 50, RW, 0x70010);
	EQUAL(lazy.idle, 0);
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5000, 4096, RW, ~0ull, &iova), false);
	EQUAL(pvdma_lazy_idle(&lazy, 0x70000, 4097, 0), PVDMA_NOT_KNOWN);
	/* the same page, which is what the host goes by */
	EQUAL(pvdma_lazy_idle(&lazy, 0x70020, 40, 0), PVDMA_IDLE);
	EQUAL(pvdma_lazy_take(&lazy, out, 1, 0), 1);
	EQUAL(out[0].address, 0x70010);
	/* and what was there before does not come back */
	EQUAL(pvdma_lazy_idle(&lazy, 0x70000, 4096, 0), PVDMA_NOT_KNOWN);
}

/* A list of whole pages or less in @entries. */
static struct pvdma_list list_of(struct pvdma_entry *entries, u32 count)
{
	struct pvdma_list list = { .entries = entries, .count = count };
	u32 i;

	for (i = 0; i < count; i++)
		list.pages += pvdma_pages(entries[i].address, entries[i].bytes);
	return list;
}

static void idle_lists_are_used_again(void)
{
	static const struct pvdma_entry kept[3] = {
		{ 0x5010, 100 }, { 0x9000, 4096 }, { 0x2000, 512 },
	};
	struct pvdma_entry entries[4], out[4];
	struct pvdma_list list = list_of(memcpy(entries, kept, sizeof(kept)), 3);
	u64 iova = 0;
	u32 i;

	memset(&lazy, 0xff, sizeof(lazy));
	pvdma_lazy_start(&lazy);
	pvdma_lazy_made_list(&lazy, &list, RW, 0x70000);
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
	EQUAL(pvdma_lazy_idle(&lazy, 0x70000, 3 * 4096, 7), PVDMA_IDLE);

	/* each entry counts, and so does their order; the list has to be all of it */
	for (i = 0; i < 3; i++) {
		entries[i].address ^= 0x1000;
		EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
		entries[i].address ^= 0x1010;
		EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
		entries[i] = kept[i];
		entries[i].bytes--;
		EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
		entries[i] = kept[i];
	}
	entries[1] = kept[2];
	entries[2] = kept[1];
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
	memcpy(entries, kept, sizeof(kept));
	list.count = 2;	/* with the third one's page: the entries alone differ */
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
	list = list_of(entries, 2);
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
	entries[3] = (struct pvdma_entry){ 0x3000, 1 };
	list = list_of(entries, 4);
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
	list = list_of(entries, 3);
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, PVDMA_MAP_READ, ~0ull, &iova), false);
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, 0x72ffe, &iova), false);
	/* nor is a list's beginning a buffer, or a buffer a list of one */
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5010, 100, RW, ~0ull, &iova), false);
	EQUAL(pvdma_lazy_reuse(&lazy, 0x5010, 3 * 4096, RW, ~0ull, &iova), false);
	pvdma_lazy_made(&lazy, 0xb000, 4096, RW, 0x80000);
	EQUAL(pvdma_lazy_idle(&lazy, 0x80000, 4096, 7), PVDMA_IDLE);
	entries[3] = (struct pvdma_entry){ 0xb000, 4096 };
	list = list_of(entries + 3, 1);
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
	EQUAL(iova, 0);

	list = list_of(entries, 3);
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, 0x6ffff, &iova), false);
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, 0x72fff, &iova), true);
	EQUAL(iova, 0x70000);
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
	EQUAL(lazy.idle, 1);
	EQUAL(pvdma_lazy_idle(&lazy, 0x70000, 3 * 4096, 8), PVDMA_IDLE);
	EQUAL(pvdma_lazy_take(&lazy, out, 4, 8), 2);
	EQUAL(out[1].address, 0x70000);
	EQUAL(out[1].bytes, 3 * 4096);
	EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
	EQUAL(lazy.free_entries, PVDMA_LAZY_ENTRIES - 1);

	/* the host gave its address away, in use or idle: what is known of it is old */
	for (i = 0; i < 2; i++) {
		pvdma_lazy_made_list(&lazy, &list, RW, 0x70000);
		if (i)
			EQUAL(pvdma_lazy_idle(&lazy, 0x70000, 3 * 4096, 9), PVDMA_IDLE);
		pvdma_lazy_made(&lazy, 0xd000, 4096, RW, 0x70000);
		EQUAL(lazy.idle, 0);
		EQUAL(lazy.free_entries, PVDMA_LAZY_ENTRIES - 1);
		EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), false);
	}
}

/* A step of what the books find lists by. */
static u64 stir(u64 key, u64 value)
{
	return (key ^ value) * 0x9e3779b97f4a7c15ull;
}

static u64 fold(u64 key)
{
	return key ^ key >> 32;
}

/* It does not decide: lists that share it are told apart, and from a buffer. */
static void lists_of_one_key_are_told_apart(void)
{
	const struct pvdma_entry all[4][2] = {
		/* differing in addresses, then in lengths alone */
		{ { 0x5000, 4096 }, { 0x9000, 4096 } },
		{ { 0x6000, 4096 }, { 0x9000 ^ stir(fold(stir(2, 0x5000)), 4096) ^
				      stir(fold(stir(2, 0x6000)), 4096), 4096 } },
		{ { 0x5000, 4096 }, { 0x9000, 4096 } },
		{ { 0x5000, 4095 }, { 0x9000, 4096 ^
				      fold(stir(stir(fold(stir(2, 0x5000)), 4096), 0x9000)) ^
				      fold(stir(stir(fold(stir(2, 0x5000)), 4095), 0x9000)) } },
	};
	struct pvdma_entry entries[2], others[2];
	struct pvdma_list list = { .entries = entries, .count = 2, .pages = 2 };
	struct pvdma_list other = { .entries = others, .count = 2, .pages = 2 };
	u64 iova;
	u32 i, j;

	for (j = 0; j < 4; j += 2) {
		memcpy(entries, all[j], sizeof(entries));
		memcpy(others, all[j + 1], sizeof(others));
		pvdma_lazy_start(&lazy);
		pvdma_lazy_made_list(&lazy, &list, RW, 0x70000);
		pvdma_lazy_made_list(&lazy, &other, RW, 0x80000);
		EQUAL(lazy.records[1].key, lazy.records[2].key);
		for (i = 0; i < 2; i++) {
			iova = 0x70000 + i * 0x10000;
			EQUAL(pvdma_lazy_idle(&lazy, iova, 8192, 0), PVDMA_IDLE);
			EQUAL(pvdma_lazy_reuse(&lazy, lazy.records[1].key, 8192, RW, ~0ull,
					       &iova), false);
			EQUAL(pvdma_lazy_reuse_list(&lazy, i ? &list : &other, RW, ~0ull,
						    &iova), false);
			EQUAL(pvdma_lazy_reuse_list(&lazy, i ? &other : &list, RW, ~0ull,
						    &iova), true);
			EQUAL(iova, 0x70000 + i * 0x10000);
		}
	}
}

/* A list for which there is no room is unmapped late all the same. */
static void the_room_for_lists_has_an_end(void)
{
	enum { LISTS = 1000, ENTRIES = 64, KNOWN = (PVDMA_LAZY_ENTRIES - 1) / ENTRIES,
	       LAST = (PVDMA_LAZY_ENTRIES - 1) % ENTRIES };
	struct pvdma_entry entries[ENTRIES], out[1];
	struct pvdma_list list;
	u32 i, j, round;
	u64 iova;

	pvdma_lazy_start(&lazy);
	for (round = 0; round < 3; round++) {
		for (i = 0; i < LISTS; i++) {
			for (j = 0; j < ENTRIES; j++)
				entries[j] = (struct pvdma_entry){ (i * ENTRIES + j) * 8192ull, 4096 };
			list = list_of(entries, ENTRIES);
			pvdma_lazy_made_list(&lazy, &list, RW, (i * 2ull + 1) << 20);
			EQUAL(pvdma_lazy_idle(&lazy, (i * 2ull + 1) << 20, ENTRIES * 4096, i), PVDMA_IDLE);
			EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), i < KNOWN);
			if (i < KNOWN)
				EQUAL(pvdma_lazy_idle(&lazy, iova, ENTRIES * 4096, i), PVDMA_IDLE);
		}
		/* to the last entry */
		EQUAL(lazy.free_entries, LAST);
		list = list_of(entries, LAST + 1);
		pvdma_lazy_made_list(&lazy, &list, RW, 1ull << 33);
		EQUAL(lazy.free_entries, LAST);
		list = list_of(entries, LAST);
		pvdma_lazy_made_list(&lazy, &list, RW, 1ull << 34);
		EQUAL(lazy.free_entries, 0);
		EQUAL(pvdma_lazy_idle(&lazy, 1ull << 33, (LAST + 1) * 4096, LISTS), PVDMA_IDLE);
		EQUAL(pvdma_lazy_idle(&lazy, 1ull << 34, LAST * 4096, LISTS), PVDMA_IDLE);
		EQUAL(pvdma_lazy_reuse_list(&lazy, &list, RW, ~0ull, &iova), true);
		EQUAL(iova, 1ull << 34);
		EQUAL(pvdma_lazy_idle(&lazy, iova, LAST * 4096, LISTS), PVDMA_IDLE);
		for (i = 0; i < LISTS; i++) {
			EQUAL(pvdma_lazy_take(&lazy, out, 1, LISTS), 1);
			EQUAL(out[0].address, (i * 2ull + 1) << 20);
			EQUAL(out[0].bytes, ENTRIES * 4096);
		}
		EQUAL(pvdma_lazy_take(&lazy, out, 1, LISTS), 1);
		EQUAL(pvdma_lazy_take(&lazy, out, 1, LISTS), 1);
		EQUAL(lazy.free_entries, PVDMA_LAZY_ENTRIES - 1);
	}
}

static void the_books_have_an_end(void)
{
	struct pvdma_entry out[1], entry = { 0x5000, 4096 };
	struct pvdma_list list = list_of(&entry, 1);
	u64 iova;
	u32 i;

	pvdma_lazy_start(&lazy);
	/* the place 0 is nobody's */
	for (i = 1; i < PVDMA_LAZY_RECORDS; i++)
		pvdma_lazy_made(&lazy, i * 4096ull, 4096, RW, i * 8192ull);
	pvdma_lazy_made(&lazy, 0x5000, 4096, RW, 0x12345000);
	EQUAL(pvdma_lazy_idle(&lazy, 0x12345000, 4096, 0), PVDMA_NOT_KNOWN);
	pvdma_lazy_made_list(&lazy, &list, RW, 0x12345000);
	EQUAL(pvdma_lazy_idle(&lazy, 0x12345000, 4096, 0), PVDMA_NOT_KNOWN);
	EQUAL(lazy.free_entries, PVDMA_LAZY_ENTRIES - 1);
	for (i = 1; i < PVDMA_LAZY_RECORDS; i++)
		EQUAL(pvdma_lazy_idle(&lazy, i * 8192ull, 4096, i), PVDMA_IDLE);
	EQUAL(lazy.idle, PVDMA_LAZY_RECORDS - 1);
	EQUAL(pvdma_lazy_reuse(&lazy, 7 * 4096, 4096, RW, ~0ull, &iova), true);
	/* the longest idle ones first, and nothing younger than is asked for */
	for (i = 1; i < 100; i++) {
		if (i == 7)
			continue;
		EQUAL(pvdma_lazy_take(&lazy, out, 1, 99), 1);
		EQUAL(out[0].address, i * 8192ull);
	}
	EQUAL(pvdma_lazy_take(&lazy, out, 1, 99), 0);
	pvdma_lazy_made(&lazy, 0x5000, 4096, RW, 0x12345000);
	EQUAL(pvdma_lazy_idle(&lazy, 0x12345000, 4096, 0), PVDMA_IDLE);
}

/* At random, against books that are kept the long way. */
static void random_lazy_mappings(void)
{
	enum { NONE, LIVE, IDLE };
	/* a list: how many pages follow the first entry */
	static struct { int state; u64 gpa, bytes, more; u32 flags; u64 since; } naive[512];
	u64 now = 0, iova, i, idle;
	struct pvdma_entry out[8], entries[6];
	struct pvdma_list list;
	u32 round, n;

	pvdma_lazy_start(&lazy);
	memset(naive, 0, sizeof(naive));
	for (round = 0; round < 300000; round++) {
		u64 r = random_below(0x80000000);
		u64 slot = r % 512, gpa = (r >> 9) % 16 * 4096, bytes = 1 + (r >> 13) % 2;
		u32 flags = 1 + (r >> 15) % 2;
		u64 more = (r >> 21) % 6;
		bool found;

		now += r >> 20 & 1;
		switch ((r >> 16) % 8) {
		case 0:	/* map, at this slot if nothing idle will do */
		case 1:
		case 2:
			entries[0] = (struct pvdma_entry){ gpa, bytes };
			for (i = 0; i < more; i++)
				entries[1 + i] = (struct pvdma_entry){ i * 4096, 4096 };
			list = list_of(entries, 1 + more);
			found = more ? pvdma_lazy_reuse_list(&lazy, &list, flags, ~0ull, &iova) :
				pvdma_lazy_reuse(&lazy, gpa, bytes, flags, ~0ull, &iova);
			for (i = 0; i < 512; i++) {
				if (naive[i].state == IDLE && naive[i].gpa == gpa &&
				    naive[i].more == more &&
				    naive[i].bytes == bytes && naive[i].flags == flags)
					break;
			}
			EQUAL(found, i < 512);
			if (found) {
				i = iova >> 15;
				EQUAL(naive[i].state, IDLE);
				EQUAL(naive[i].gpa, gpa);
				EQUAL(naive[i].bytes, bytes);
				EQUAL(naive[i].more, more);
				EQUAL(naive[i].flags, flags);
				naive[i].state = LIVE;
			} else if (naive[slot].state == NONE) {
				if (more)
					pvdma_lazy_made_list(&lazy, &list, flags, slot << 15);
				else
					pvdma_lazy_made(&lazy, gpa, bytes, flags, slot << 15);
				naive[slot].state = LIVE;
				naive[slot].gpa = gpa;
				naive[slot].bytes = bytes;
				naive[slot].more = more;
				naive[slot].flags = flags;
			}
			break;
		case 3:	/* the longest idle ones go */
			n = pvdma_lazy_take(&lazy, out, r % 9, now - 3);
			for (i = 0; i < n; i++) {
				u64 at = out[i].address >> 15, j;

				EQUAL(naive[at].state, IDLE);
				EQUAL(out[i].bytes, naive[at].more ? (1 + naive[at].more) * 4096 : naive[at].bytes);
				for (j = 0; j < 512; j++)
					EQUAL(naive[j].state == IDLE && naive[j].since < naive[at].since, 0);
				naive[at].state = NONE;
			}
			for (i = 0; i < 512 && n < r % 9; i++)
				EQUAL(naive[i].state == IDLE && (s64)(now - 3 - naive[i].since) >= 0, 0);
			break;
		default:
			switch (pvdma_lazy_idle(&lazy, slot << 15,
						naive[slot].more ? (1 + naive[slot].more) * 4096 :
						naive[slot].bytes, now)) {
			case PVDMA_IDLE:
				EQUAL(naive[slot].state, LIVE);
				naive[slot].state = IDLE;
				naive[slot].since = now;
				break;
			case PVDMA_NOT_KNOWN:
				EQUAL(naive[slot].state, NONE);
				break;
			case PVDMA_IDLE_ALREADY:
				EQUAL(naive[slot].state, IDLE);
				break;
			}
		}
		for (i = idle = 0; i < 512; i++)
			idle += naive[i].state == IDLE;
		EQUAL(lazy.idle, idle);
	}
}

static void has_words(void)
{
	EQUAL(strcmp(pvdma_status_name(status(PVDMA_STATUS_LIMIT, 28)), "limit"), 0);
	EQUAL(strcmp(pvdma_status_name(77), "unknown status"), 0);
	EQUAL(strcmp(pvdma_policy_name(PVDMA_POLICY_STRICT), "strict"), 0);
	EQUAL(strcmp(pvdma_policy_name(9), "unknown policy"), 0);
}

static const struct {
	const char *name;
	void (*run)(void);
} tests[] = {
#define TEST(name) { #name, name }
	TEST(discovers),
	TEST(discovery_keeps_limits),
	TEST(refuses_another_major),
	TEST(probes),
	TEST(asks_for_devices),
	TEST(gets_along_with_a_1_0_host),
	TEST(releases),
	TEST(finds_the_table),
	TEST(counts_in_the_table),
	TEST(the_table_has_an_end),
	TEST(one_page_is_counted_in_the_usual_case_only),
	TEST(counts_do_not_overflow),
	TEST(maps_what_is_counted),
	TEST(mappings_fit_the_limits),
	TEST(maps_and_unmaps),
	TEST(repeats_when_told),
	TEST(failures_are_counted_by_class),
	TEST(mappings_go_with_their_device),
	TEST(refused_unmaps_change_nothing),
	TEST(unusable_answers_are_undone),
	TEST(counts_pages),
	TEST(builds_lists),
	TEST(lists_respect_boundaries),
	TEST(maps_lists),
	TEST(a_list_of_one_is_a_map),
	TEST(unmaps_lists),
	TEST(unmap_list_goes_on_where_it_stopped),
	TEST(unmap_list_steps_over_failures),
	TEST(joins_segments),
	TEST(random_lists_come_back),
	TEST(idle_mappings_are_used_again),
	TEST(unmaps_that_are_wrong_are_seen),
	TEST(idle_lists_are_used_again),
	TEST(lists_of_one_key_are_told_apart),
	TEST(the_room_for_lists_has_an_end),
	TEST(the_books_have_an_end),
	TEST(random_lazy_mappings),
	TEST(has_words),
};

int main(int argc, char **argv)
{
	u32 i;

	for (i = 0; i < ARRAY_SIZE(tests); i++) {
		if (argc < 2) {
			puts(tests[i].name);
		} else if (!strcmp(argv[1], tests[i].name)) {
			tests[i].run();
			all_asked(__LINE__);
			return 0;
		}
	}
	return argc < 2 ? 0 : 2;
}
