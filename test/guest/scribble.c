/* SPDX-License-Identifier: MIT */
/*
 * A guest that is hostile to policy cached: all CPUs but the first write anything to
 * the tracking table, and make random and nearly right calls for the devices that are
 * counted in it, which never reach memory or, where they are edus, copy from and to
 * anywhere; they begin the table anew as well, and believe nothing of what they are
 * told. CPU 0 meanwhile has an edu of a domain of its own copy between pages that it
 * maps for each copy, and compares what arrives. Nothing of the others' may be seen
 * there; what becomes of their own memory is their affair.
 *
 * seed=N calls=N (in all). Ends with
 *
 *	guest: scribble calls N ok N copies N wrong N
 *
 * calls: the attackers'. wrong: bytes, or answers, that cannot be.
 */
#include "edu.h"

#define PAGE		PVDMA_PAGE_BYTES
#define GIB		(1ull << 30)
#define HIGH		(1ull << 32)
#define WORDS		(4096u / 4)
#define HANDLES		8u

/* Memory of the innocent device, which no call of an attacker names. */
#define ARENA		0x1000000ull
#define ARENA_BYTES	0x1000000ull

struct cpu {
	struct pvdma_entry call_page[PVDMA_LIST_ENTRIES] __attribute__((aligned(4096)));
	struct pvdma_counters counters;
	u64 random;
	u64 calls, ok;
};

static struct cpu cpus[CPUS_MAX];
static u32 source[WORDS] __attribute__((aligned(4096)));
static u32 target[WORDS] __attribute__((aligned(4096)));
static struct pvdma_host host;
static struct pvdma_table table;
/* Devices that are counted in the table, and the edus among them. */
static u32 handles[HANDLES], handle_count;
static u64 edus[HANDLES];
static u32 edu_count;
static u32 innocent;
static u64 innocent_edu;
static u64 calls, copies, wrong_bytes;
static u32 attackers;		/* that have not ended yet */

static u64 random(struct cpu *cpu)
{
	cpu->random ^= cpu->random << 13;
	cpu->random ^= cpu->random >> 7;
	cpu->random ^= cpu->random << 17;
	return cpu->random * 0x2545f4914f6cdd1dull;
}

static u64 below(struct cpu *cpu, u64 n)
{
	return (random(cpu) >> 32) * n >> 32;
}

static bool one_in(struct cpu *cpu, u32 n)
{
	return below(cpu, n) == 0;
}

/* --- the attackers -------------------------------------------------------- */

/* Mostly RAM that is theirs, now and then what is none, or no address at all. */
static u64 any_gpa(struct cpu *cpu)
{
	const u64 edges[] = {
		0, PAGE - 1, guest_ram.low_end - PAGE, guest_ram.low_end, table.gpa,
		table.gpa + table.pages * 4, HIGH, 1ull << 44, 1ull << 53, ~0ull, random(cpu),
	};

	if (one_in(cpu, 8))
		return edges[below(cpu, sizeof(edges) / sizeof(edges[0]))];
	return ARENA + below(cpu, ARENA_BYTES);
}

static u64 any_bytes(struct cpu *cpu)
{
	const u64 edges[] = { 0, PAGE, GIB, GIB + 1, 1ull << 53, ~0ull, random(cpu) };

	if (one_in(cpu, 8))
		return edges[below(cpu, sizeof(edges) / sizeof(edges[0]))];
	return 1 + below(cpu, 4 * PAGE);
}

/* An entry of the table that is in use as likely as not, and any word. */
static void scribble(struct cpu *cpu)
{
	const u32 words[] = {
		0, PVDMA_TABLE_PINNED, PVDMA_TABLE_PINNED | PVDMA_TABLE_USED, PVDMA_TABLE_USED,
		PVDMA_TABLE_PINNED | 1, 1, PVDMA_TABLE_COUNT_MASK, PVDMA_TABLE_COUNT_MAX,
		~0u, (u32)random(cpu),
	};
	u64 page = one_in(cpu, 8) ? below(cpu, table.pages) :
				    (ARENA + below(cpu, ARENA_BYTES)) / PAGE;
	u32 *entry = &table.entries[page];
	u32 word = words[below(cpu, sizeof(words) / sizeof(words[0]))];

	switch (below(cpu, 4)) {
	case 0:
		__atomic_store_n(entry, word, __ATOMIC_SEQ_CST);
		break;
	case 1:
		__atomic_fetch_xor(entry, word, __ATOMIC_SEQ_CST);
		break;
	case 2:
		__atomic_fetch_add(entry, word, __ATOMIC_SEQ_CST);
		break;
	default:
		/* as if it had not been, so that a look between the two sees something else */
		__atomic_fetch_xor(entry, word, __ATOMIC_SEQ_CST);
		__atomic_fetch_xor(entry, word, __ATOMIC_SEQ_CST);
	}
}

static void make_call(struct cpu *cpu)
{
	static const u32 numbers[] = {
		PVDMA_CALL_MAP, PVDMA_CALL_MAP, PVDMA_CALL_MAP, PVDMA_CALL_UNMAP,
		PVDMA_CALL_MAP_LIST, PVDMA_CALL_MAP_LIST, PVDMA_CALL_UNMAP_LIST,
		PVDMA_CALL_RELEASE, PVDMA_CALL_TABLE, PVDMA_CALL_IS_ASSIGNED,
	};
	u32 number = numbers[below(cpu, sizeof(numbers) / sizeof(numbers[0]))], i;
	u64 flags = one_in(cpu, 16) ? random(cpu) : PVDMA_MAP_READ | PVDMA_MAP_WRITE;
	struct registers registers = {
		.rax = number, .rdx = host.port,
		.rdi = one_in(cpu, 32) ? random(cpu) | 1ull << 40 :
					 handles[below(cpu, handle_count)],
		.rsi = any_gpa(cpu), .r8 = any_bytes(cpu), .r9 = one_in(cpu, 16) ? random(cpu) : ~0ull,
		.r10 = flags | (one_in(cpu, 3) ? 0 : PVDMA_MAP_COUNTED),
	};

	if (number == PVDMA_CALL_MAP_LIST || number == PVDMA_CALL_UNMAP_LIST) {
		registers.r8 = 1 + below(cpu, one_in(cpu, 16) ? PVDMA_LIST_ENTRIES : 8);
		for (i = 0; i < registers.r8; i++)
			cpu->call_page[i] = (struct pvdma_entry) { any_gpa(cpu), any_bytes(cpu) };
		registers.rsi = (u64)cpu->call_page;
	}
	/* anew, but seldom: there would never be much to attack */
	if (number == PVDMA_CALL_TABLE)
		registers.rsi = one_in(cpu, 16) ? 1 : 2 * below(cpu, 2);
	registers_out32(&registers);
	cpu->calls++;
	cpu->ok += PVDMA_STATUS_CLASS(registers.rax) == PVDMA_STATUS_OK;
}

static void attack(struct cpu *cpu)
{
	u32 i;

	while (cpu->calls < calls) {
		for (i = 0; i < 16; i++)
			scribble(cpu);
		make_call(cpu);
		if (edu_count && one_in(cpu, 64)) {
			u64 edu = edus[below(cpu, edu_count)];

			if (one_in(cpu, 2))
				edu_fetch(edu, any_gpa(cpu), 1 + (u32)below(cpu, 4000));
			else
				edu_store(edu, ARENA + below(cpu, ARENA_BYTES - PAGE),
					  1 + (u32)below(cpu, 4000));
		}
	}
	__atomic_fetch_sub(&attackers, 1, __ATOMIC_SEQ_CST);
}

/* --- the innocent --------------------------------------------------------- */

static void copy(struct cpu *cpu)
{
	u32 seed = (u32)random(cpu), i;
	u64 from, to;

	for (i = 0; i < WORDS; i++) {
		source[i] = (seed + i) * 2654435761u;
		target[i] = 0;
	}
	/* the attackers may have taken all that there is to pin */
	if (PVDMA_STATUS_CLASS(pvdma_map(&host, &cpu->counters, innocent, (u64)source, PAGE,
					 EDU_IOVA_MAX, PVDMA_MAP_READ, &from)))
		return;
	if (!PVDMA_STATUS_CLASS(pvdma_map(&host, &cpu->counters, innocent, (u64)target, PAGE,
					  EDU_IOVA_MAX, PVDMA_MAP_WRITE, &to))) {
		edu_fetch(innocent_edu, from, 4 * (WORDS - 1));
		edu_wait(innocent_edu);
		edu_store(innocent_edu, to, 4 * (WORDS - 1));
		edu_wait(innocent_edu);
		for (i = 0; i < WORDS; i++)
			wrong_bytes += __atomic_load_n(&target[i], __ATOMIC_RELAXED) !=
				       (i < WORDS - 1 ? (seed + i) * 2654435761u : 0);
		copies++;
		wrong_bytes += !!pvdma_unmap(&host, &cpu->counters, innocent, to, PAGE);
	}
	wrong_bytes += !!pvdma_unmap(&host, &cpu->counters, innocent, from, PAGE);
}

static void work(u32 number)
{
	struct cpu *cpu = &cpus[number];

	if (number) {
		attack(cpu);
		return;
	}
	while (__atomic_load_n(&attackers, __ATOMIC_SEQ_CST))
		if (innocent)
			copy(cpu);
		else
			relax();
}

static void find_devices(void)
{
	struct pvdma_assignment found;
	u32 slot;

	for (slot = 1; slot < 32; slot++) {
		bool is_edu = pci_read(slot, 0, 0) == EDU_ID;

		if (pvdma_is_assigned(&host, &cpus[0].counters, slot << 3, &found) || !found.handle)
			continue;
		if (found.policy == PVDMA_POLICY_CACHED && handle_count < HANDLES) {
			handles[handle_count++] = found.handle;
			if (is_edu)
				edus[edu_count++] = edu_enable(slot);
		} else if (is_edu) {
			innocent = found.handle;
			innocent_edu = edu_enable(slot);
		}
	}
}

void guest_main(void)
{
	u64 seed = option_number("seed", 1), made = 0, ok = 0;
	struct pvdma_table anew;
	u32 i;

	if (pvdma_discover(&host) != PVDMA_FOUND)
		return;
	find_devices();
	if (!handle_count ||
	    pvdma_find_table(&host, &cpus[0].counters, handles[0], false, &table) || !table.pages ||
	    guest_ram.low_end < ARENA + ARENA_BYTES) {
		print("guest: no device under policy cached, or too little RAM\n");
		return;
	}
	table.entries = (u32 *)table.gpa;
	attackers = cpu_count() - 1;
	calls = option_number("calls", 10000) / attackers;
	for (i = 0; i < CPUS_MAX; i++)
		cpus[i].random = (seed * CPUS_MAX + i + 1) * 0x9e3779b97f4a7c15ull;
	run_on_cpus(work);
	for (i = 0; i < CPUS_MAX; i++) {
		made += cpus[i].calls;
		ok += cpus[i].ok;
	}
	/* and it works again as if nothing had been */
	wrong_bytes += !!pvdma_find_table(&host, &cpus[0].counters, handles[0], true, &anew);
	for (i = 0; i < table.pages; i++)
		wrong_bytes += pvdma_entry_read(&table.entries[i]) != 0;
	print("guest: scribble calls %lu ok %lu copies %lu wrong %lu\n", (unsigned long)made,
	      (unsigned long)ok, (unsigned long)copies, (unsigned long)wrong_bytes);
	serial_read();
}
