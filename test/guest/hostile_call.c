// SPDX-License-Identifier: MIT
/*
 * One call of the hostile guest: made with all registers known, beside things that
 * are no call and from CPL 3, and held against what the contract says of every
 * answer. Counts what the host has to have counted.
 */
#include "hostile.h"

struct run run;
struct pvdma_iova_range run_ranges[PVDMA_LIST_ENTRIES] __attribute__((aligned(4096)));
struct cpu cpu_data[CPUS_MAX] __attribute__((aligned(64)));

#define WRONG_PRINTED	4

void wrong(struct cpu *cpu, const char *what)
{
	const struct registers *in = &cpu->asked, *out = &cpu->now;

	if (cpu->wrong++ >= WRONG_PRINTED)
		return;
	print("guest: wrong %s, cpu %u, call %lu: in rax=%lx rdi=%lx rsi=%lx r8=%lx r9=%lx r10=%lx"
	      " out rax=%lx rdi=%lx rsi=%lx r8=%lx r9=%lx r10=%lx\n", what, cpu->number,
	      (unsigned long)cpu->made, (unsigned long)in->rax, (unsigned long)in->rdi,
	      (unsigned long)in->rsi, (unsigned long)in->r8, (unsigned long)in->r9,
	      (unsigned long)in->r10, (unsigned long)out->rax, (unsigned long)out->rdi,
	      (unsigned long)out->rsi, (unsigned long)out->r8, (unsigned long)out->r9,
	      (unsigned long)out->r10);
}

#define EPERM	1
#define ENOSYS	38

/* Registers that a call sets, by their place in struct registers. */
#define RAX	0
#define RSI	4
#define RDI	5
#define R8	7
#define R9	8
#define R10	9
#define SETS(r)	(1u << (r))

static const struct {
	const char *name;
	u32 ok;			/* set with ok */
	bool list;		/* rsi: entries done, with every status */
} calls[CALLS] = {
	{ "unknown", 0, false },
	[PVDMA_CALL_PROBE] = { "probe", SETS(RDI) | SETS(RSI) | SETS(R8) | SETS(R9) | SETS(R10), false },
	[PVDMA_CALL_IS_ASSIGNED] = { "is_assigned",
		SETS(RDI) | SETS(RSI) | SETS(R8) | SETS(R9) | SETS(R10), false },
	[PVDMA_CALL_MAP] = { "map", SETS(RDI), false },
	[PVDMA_CALL_UNMAP] = { "unmap", SETS(RDI), false },
	[PVDMA_CALL_MAP_LIST] = { "map_list", SETS(RDI), true },
	[PVDMA_CALL_UNMAP_LIST] = { "unmap_list", SETS(RDI), true },
	[PVDMA_CALL_RELEASE] = { "release", SETS(RDI) | SETS(RSI), false },
	[PVDMA_CALL_TABLE] = { "table", SETS(RDI) | SETS(RSI), false },
};

static u32 call_of(const struct registers *registers)
{
	u32 number = (u32)registers->rax;

	return number < CALLS ? number : 0;
}

/* All registers are as in `expected', but for those in `set'. */
static bool kept(const struct registers *is, const struct registers *expected, u32 set)
{
	const u64 *a = (const u64 *)is, *b = (const u64 *)expected;
	u32 i;

	for (i = 0; i < REGISTERS; i++)
		if (a[i] != b[i] && !(set & SETS(i)))
			return false;
	return true;
}

/* Executes something beside the call in the registers, which is none. */
static void no_call(struct cpu *cpu)
{
	struct registers *now = &cpu->now, expected = *now;
	static const u64 beside[] = { -3ull, -1ull, 1, 4 };
	u32 words[8], i;

	for (i = 0; i < COUNT(words); i++)
		words[i] = ~(u32)now->rax;
	cpu->asked = *now;
	switch (below(cpu, 6)) {
	case 0:
		registers_out8(now);
		break;
	case 1:
		registers_out16(now);
		break;
	case 2:
		expected.rax = 0xffffffff;
		registers_in32(now);
		break;
	case 3:
		now->rsi = (u64)words;
		expected.rsi = now->rsi + 4;
		registers_outs32(now);
		break;
	case 4:
		now->rsi = (u64)words;
		now->rcx = below(cpu, COUNT(words) + 1);
		expected.rsi = now->rsi + 4 * now->rcx;
		expected.rcx = 0;
		registers_rep_outs32(now);
		break;
	default:
		now->rdx += PICK(cpu, beside);
		expected.rdx = now->rdx;
		registers_out32(now);
	}
	if (!kept(now, &expected, 0))
		wrong(cpu, "changes by no call");
	*now = cpu->asked;
}

static void at_cpl3(void *registers)
{
	registers_out32(registers);
}

/* The call in the registers from CPL 3: refused, and nothing of it is done. */
static void call_from_cpl3(struct cpu *cpu)
{
	struct registers *now = &cpu->now, expected = *now;

	cpu->asked = *now;
	expected.rax = PVDMA_STATUS_INVALID | EPERM << 8;
	if (calls[call_of(now)].list)
		expected.rsi = 0;
	user_run(at_cpl3, now);
	if (!kept(now, &expected, 0))
		wrong(cpu, "answer to CPL 3");
	*now = cpu->asked;
	cpu->refused_cpl++;
}

bool call(struct cpu *cpu, u32 allowed)
{
	struct registers *now = &cpu->now;
	u32 number = call_of(now), class, set = SETS(RAX);
	bool ok;

	if (one_in(cpu, 128))
		no_call(cpu);
	if (cpu->number == 0 && one_in(cpu, 64))
		call_from_cpl3(cpu);
	cpu->asked = *now;
	registers_out32(now);
	cpu->made++;

	class = PVDMA_STATUS_CLASS(now->rax);
	ok = class == PVDMA_STATUS_OK;
	if (now->rax >> 32 || class >= CLASSES || !(allowed & 1u << class)) {
		wrong(cpu, "status");
		class = class < CLASSES ? class : PVDMA_STATUS_INVALID;
	}
	if (ok)
		set |= calls[number].ok;
	if (calls[number].list)
		set |= SETS(RSI);
	if (!kept(now, &cpu->asked, set))
		wrong(cpu, "register");
	if (class == PVDMA_STATUS_LIMIT)
		cpu->limits[PVDMA_STATUS_ERRNO(now->rax) % COUNT(cpu->limits)]++;
	if (number)
		cpu->count[number][class]++;
	else if (now->rax == (PVDMA_STATUS_INVALID | ENOSYS << 8))
		cpu->refused_unknown++;
	else
		wrong(cpu, "answer to no call");
	return ok;
}

void pages_done(struct cpu *cpu, u64 pages)
{
	cpu->pages[call_of(&cpu->asked)] += pages;
}

void set_call(struct cpu *cpu, u32 number, u64 handle, u64 rsi, u64 r8)
{
	u64 *words = (u64 *)&cpu->now, any = random(cpu);
	u32 i;

	for (i = 0; i < REGISTERS; i++)
		words[i] = any += 0x9e3779b97f4a7c15ull;
	cpu->now.rax = (cpu->now.rax & ~0xffffffffull) | number;
	cpu->now.rdx = (cpu->now.rdx & ~0xffffull) | run.host.port;
	cpu->now.rdi = handle;
	cpu->now.rsi = rsi;
	cpu->now.r8 = r8;
}

void set_map(struct cpu *cpu, u32 number, u64 handle, u64 rsi, u64 r8, u64 iova_max, u64 flags)
{
	set_call(cpu, number, handle, rsi, r8);
	cpu->now.r9 = iova_max;
	cpu->now.r10 = flags;
}

u64 check_iova(struct cpu *cpu, u64 offset, u64 pages)
{
	u64 first = cpu->now.rdi & ~(PAGE - 1), end = first + pages * PAGE, aligned = PAGE;
	u32 i, j;

	if ((cpu->now.rdi & (PAGE - 1)) != offset)
		wrong(cpu, "offset in the page");
	if (end - 1 > cpu->asked.r9)
		wrong(cpu, "iova above the limit");
	for (i = 0; i < run.ranges && (first < run_ranges[i].first || end - 1 > run_ranges[i].last); i++)
		;
	if (i == run.ranges)
		wrong(cpu, "iova in no range");
	while (aligned < pages * PAGE)
		aligned *= 2;
	if (cpu->asked.r10 & PVDMA_MAP_ALIGN && first & (aligned - 1))
		wrong(cpu, "iova not aligned");
	/* what is in the tables now is live, as is the new one, unless it is anybody's */
	for (i = 0; pages % 3 == 0 && i < run.cpus; i++)
		for (j = 0; j < OWN_MAPPINGS; j++)
			if (overlaps(__atomic_load_n(&cpu_data[i].own[j], __ATOMIC_RELAXED), first, end))
				wrong(cpu, "iova of a live mapping");
	if (run.shared_domain && innocent_overlaps(first, end))
		wrong(cpu, "iova of the innocent device");
	pages_done(cpu, pages);
	return first;
}

void check_unmapped(struct cpu *cpu, u64 pages)
{
	if (cpu->now.rdi != pages * PAGE)
		wrong(cpu, "bytes unmapped");
	pages_done(cpu, pages);
}

void report(void)
{
	u64 classes[CLASSES] = { 0 }, mapped = 0, unmapped = 0, made = 0, cpl = 0, unknown_calls = 0;
	u64 limited[COUNT(cpu_data[0].limits)] = { 0 };
	u32 bad = 0, i, number, class, errno;

	for (number = 1; number < CALLS; number++) {
		u64 count = 0, errors = 0, pages = 0;

		for (i = 0; i < run.cpus; i++) {
			const struct cpu *cpu = &cpu_data[i];

			for (class = 0; class < CLASSES; class++) {
				classes[class] += cpu->count[number][class];
				count += cpu->count[number][class];
				errors += class == PVDMA_STATUS_OK ? 0 : cpu->count[number][class];
			}
			pages += cpu->pages[number];
		}
		print("count %s calls=%lu errors=%lu pages=%lu\n", calls[number].name, (unsigned long)count,
		      (unsigned long)errors, (unsigned long)pages);
		if (number == PVDMA_CALL_MAP || number == PVDMA_CALL_MAP_LIST)
			mapped += pages;
		else
			unmapped += pages;
	}
	for (i = 0; i < run.cpus; i++) {
		bad += cpu_data[i].wrong;
		made += cpu_data[i].made;
		cpl += cpu_data[i].refused_cpl;
		unknown_calls += cpu_data[i].refused_unknown;
		for (errno = 0; errno < COUNT(limited); errno++)
			limited[errno] += cpu_data[i].limits[errno];
	}
	for (errno = 0; errno < COUNT(limited); errno++)
		if (limited[errno])
			print("limit %u %lu\n", errno, (unsigned long)limited[errno]);
	for (class = 0; class < CLASSES; class++)
		print("status %s %lu\n", pvdma_status_name(class), (unsigned long)classes[class]);
	print("refused cpl %lu\nrefused unknown %lu\n", (unsigned long)cpl, (unsigned long)unknown_calls);
	print("guest: storm wrong=%u made=%lu mapped=%lu unmapped=%lu copies=%lu damage=%lu\n", bad,
	      (unsigned long)made, (unsigned long)mapped, (unsigned long)unmapped,
	      (unsigned long)innocent_copies, (unsigned long)innocent_damage());
}
