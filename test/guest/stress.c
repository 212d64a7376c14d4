/* SPDX-License-Identifier: MIT */
/*
 * Policy cached under pressure: every CPU maps and unmaps at random, several ranges
 * at a time, of pages that all CPUs have in common, most often of few that are hot;
 * now and then an edu copies from one of them to a page that is mapped for that, and
 * what arrives is compared. Each CPU has an edu of its own, as far as there are any,
 * or shares one; all are of one domain. The quota is the test's to set: so low that the host has to reclaim.
 *
 * maps=N: by each CPU, at least (default 10000); check=N: copies in as many steps
 * (default 100). Ends with
 *
 *	guest: maps N limited N calls N checks N wrong N
 */
#include "edu.h"

#define POOL		256u	/* pages in common; devices only read them */
#define RANGE_PAGES	3u	/* that one mapping has at most */
#define HELD		16u	/* mappings that a CPU has at a time */
#define HOT		40u	/* pages that most maps are of, for a while */
#define HOT_MAPS	512u	/* that while */
#define WORDS		(4096u / 4)
#define DEVICES		4u

struct range {
	u64 gpa;
	u64 bytes;		/* 0: none */
};

struct cpu {
	u8 target[4096] __attribute__((aligned(4096)));
	struct range held[HELD];
	struct pvdma_counters counters;
	u64 random;
	u64 maps, limited, calls, checks, wrong;
};

static u32 pool[POOL][WORDS] __attribute__((aligned(4096)));
static struct cpu cpus[CPUS_MAX];
static struct pvdma_host host;
static struct pvdma_table table;
static struct {
	u64 registers;
	u32 lock;
} edus[DEVICES];
static u32 devices, handle;
static u64 maps, check;

static u32 content(u32 page, u32 word)
{
	return (page * WORDS + word) * 2654435761u;
}

static u64 below(struct cpu *cpu, u64 n)
{
	cpu->random ^= cpu->random << 13;
	cpu->random ^= cpu->random >> 7;
	cpu->random ^= cpu->random << 17;
	return (cpu->random >> 11) % n;
}

static void wrong(struct cpu *cpu, const char *what, u64 value)
{
	if (cpu->wrong++ < 10)
		print("guest: cpu %u: %s %lx\n", (u32)(cpu - cpus), what, (unsigned long)value);
}

/* As pvdma.ko does it. False: the host is at a limit. */
static bool map(struct cpu *cpu, u64 gpa, u64 bytes)
{
	struct pvdma_entry entry = { .address = gpa, .bytes = bytes };
	struct pvdma_list list = { .entries = &entry, .count = 1 };
	bool missing = false;
	u32 status;

	cpu->maps++;
	if (pvdma_table_count_one(&table, gpa, bytes))
		return true;
	status = pvdma_table_count(&table, gpa, bytes, &missing);
	if (status) {
		wrong(cpu, "counting ended with", status);
		return false;
	}
	if (!missing)
		return true;
	cpu->calls++;
	status = pvdma_map_counted(&host, &cpu->counters, handle, &list, 0, ~0ull,
				   PVDMA_MAP_READ | PVDMA_MAP_WRITE);
	if (PVDMA_STATUS_CLASS(status) == PVDMA_STATUS_OK)
		return true;
	if (!pvdma_table_uncount(&table, gpa, bytes))
		wrong(cpu, "a count was gone at", gpa);
	if (PVDMA_STATUS_CLASS(status) != PVDMA_STATUS_LIMIT)
		wrong(cpu, "a map ended with", status);
	cpu->limited++;
	return false;
}

static void unmap(struct cpu *cpu, u64 gpa, u64 bytes)
{
	if (!pvdma_table_uncount_one(&table, gpa, bytes) &&
	    !pvdma_table_uncount(&table, gpa, bytes))
		wrong(cpu, "a count was gone at", gpa);
}

/* Copies part of a mapped range to this CPU's page, by a device, and compares. */
static void copy(struct cpu *cpu, const struct range *from)
{
	u32 which = (u32)(cpu - cpus) % devices, i;
	u64 edu = edus[which].registers;
	u32 bytes = 4 * (1 + (u32)below(cpu, 64));
	u32 offset = 4 * (u32)below(cpu, from->bytes / 4 - bytes / 4 + 1);
	u32 at = 4 * (u32)below(cpu, WORDS - bytes / 4 + 1);
	u64 source = from->gpa + offset;
	u32 *arrived = (u32 *)(cpu->target + at);
	u32 page = (u32)((source - (u64)pool) >> 12), word = (u32)(source >> 2) % WORDS;

	if (!map(cpu, (u64)cpu->target, sizeof(cpu->target)))
		return;
	for (i = 0; i < bytes / 4; i++)
		arrived[i] = 0xdeadbeef;
	lock(&edus[which].lock);
	edu_fetch(edu, source, bytes);
	edu_wait(edu);
	edu_store(edu, (u64)arrived, bytes);
	edu_wait(edu);
	unlock(&edus[which].lock);
	unmap(cpu, (u64)cpu->target, sizeof(cpu->target));
	cpu->checks++;
	for (i = 0; i < bytes / 4; i++, word++) {
		u32 arrives = __atomic_load_n(&arrived[i], __ATOMIC_RELAXED);

		if (arrives != content(page + word / WORDS, word % WORDS))
			wrong(cpu, "wrong data from", source + 4 * i);
	}
}

static void work(u32 number)
{
	struct cpu *cpu = &cpus[number];
	u64 page;
	u32 i;

	cpu->random = 0x9e3779b97f4a7c15ull * (number + 1);
	while (cpu->maps < maps) {
		struct range *range = &cpu->held[below(cpu, HELD)];

		if (range->bytes) {
			if (below(cpu, check) == 0)
				copy(cpu, range);
			unmap(cpu, range->gpa, range->bytes);
			range->bytes = 0;
			continue;
		}
		range->bytes = (1 + below(cpu, RANGE_PAGES)) << 12;
		page = cpu->maps / HOT_MAPS * 7 + below(cpu, below(cpu, 16) ? HOT : POOL);
		range->gpa = (u64)pool[page % (POOL - RANGE_PAGES + 1)];
		/* not whole pages either */
		if (below(cpu, 2)) {
			range->gpa += 512;
			range->bytes -= 1024;
		}
		if (!map(cpu, range->gpa, range->bytes))
			range->bytes = 0;
	}
	for (i = 0; i < HELD; i++) {
		if (cpu->held[i].bytes)
			unmap(cpu, cpu->held[i].gpa, cpu->held[i].bytes);
	}
}

static bool find_devices(void)
{
	struct pvdma_assignment assignment;
	u32 slot;

	for (slot = 1; slot < 32 && devices < DEVICES; slot++) {
		if (pci_read(slot, 0, 0) != EDU_ID ||
		    pvdma_is_assigned(&host, &cpus[0].counters, slot << 3, &assignment) ||
		    assignment.policy != PVDMA_POLICY_CACHED)
			continue;
		handle = assignment.handle;
		edus[devices++].registers = edu_enable(slot);
	}
	return devices && pvdma_find_table(&host, &cpus[0].counters, handle, false, &table) == 0 &&
	       table.pages;
}

void guest_main(void)
{
	static struct cpu all;
	u32 page, word, i;

	maps = option_number("maps", 10000);
	check = option_number("check", 100);
	if (pvdma_discover(&host) != PVDMA_FOUND || !find_devices()) {
		print("guest: no edu under policy cached\n");
		return;
	}
	table.entries = (u32 *)table.gpa;
	for (page = 0; page < POOL; page++) {
		for (word = 0; word < WORDS; word++)
			pool[page][word] = content(page, word);
	}
	run_on_cpus(work);
	for (i = 0; i < CPUS_MAX; i++) {
		all.maps += cpus[i].maps;
		all.limited += cpus[i].limited;
		all.calls += cpus[i].calls;
		all.checks += cpus[i].checks;
		all.wrong += cpus[i].wrong;
	}
	for (page = 0; page < POOL; page++) {
		for (word = 0; word < WORDS; word++)
			all.wrong += pool[page][word] != content(page, word);
	}
	for (i = 0; i < table.pages; i++)
		all.wrong += (pvdma_entry_read(&table.entries[i]) & PVDMA_TABLE_COUNT_MASK) != 0;
	print("guest: maps %lu limited %lu calls %lu checks %lu wrong %lu\n",
	      (unsigned long)all.maps, (unsigned long)all.limited, (unsigned long)all.calls,
	      (unsigned long)all.checks, (unsigned long)all.wrong);
}
