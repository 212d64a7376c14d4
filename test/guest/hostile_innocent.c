// SPDX-License-Identifier: MIT
/*
 * The innocent device of the hostile guest: QEMU's edu copies memory to memory, half
 * a page at a time, through mappings that are there all the time. What it has to
 * have written where is known, and looked at when all is over.
 */
#include "edu.h"
#include "hostile.h"

#define PIECE		(PAGE / 2)

static struct innocent {
	u64 pages;
	u32 flags;
	u64 gpa;
	u64 iova;
} innocents[] = {
	{ 5, PVDMA_MAP_READ, 0, 0 }, { 10, PVDMA_MAP_READ, 0, 0 },
	{ 5, PVDMA_MAP_WRITE, 0, 0 }, { 20, PVDMA_MAP_WRITE | PVDMA_MAP_ALIGN, 0, 0 },
};
#define SOURCES		2
#define INNOCENTS	COUNT(innocents)

/* What the device wrote last to each piece of the targets: the piece it came from, 0: none. */
static u64 origin[INNOCENTS][2 * 20];

static u64 edu;
static struct {
	bool storing;		/* to memory; else fetching from it */
	bool busy;
	u64 from;		/* gpa */
	u32 target, piece;
} transfer;
u64 innocent_copies;

bool innocent_overlaps(u64 first, u64 end)
{
	u32 i;

	for (i = 0; i < INNOCENTS; i++)
		if (run.innocent && overlaps(MAPPING(innocents[i].iova, innocents[i].pages), first, end))
			return true;
	return false;
}

mapping innocent_any(struct cpu *cpu)
{
	const struct innocent *one = &PICK(cpu, innocents);

	return run.innocent ? MAPPING(one->iova, one->pages) : 0;
}

static u64 pattern(u64 gpa)
{
	return (gpa ^ run.seed) * 0x9e3779b97f4a7c15ull;
}

static void map_innocents(struct cpu *cpu)
{
	u64 gpa = ARENA_INNOCENT, word;
	u32 i;

	for (i = 0; i < INNOCENTS; i++) {
		struct innocent *one = &innocents[i];

		one->gpa = gpa;
		/* a page between that is nobody's */
		gpa += (one->pages + 1) * PAGE;
		for (word = one->gpa; word < gpa; word += 8)
			*(u64 *)word = i < SOURCES ? pattern(word) : 0;
		set_map(cpu, PVDMA_CALL_MAP, run.innocent, one->gpa, one->pages * PAGE, EDU_IOVA_MAX, one->flags);
		if (call(cpu, OK))
			one->iova = check_iova(cpu, 0, one->pages);
	}
}

static void unmap_innocents(struct cpu *cpu)
{
	u32 i;

	for (i = 0; i < INNOCENTS; i++) {
		set_call(cpu, PVDMA_CALL_UNMAP, run.innocent, innocents[i].iova, innocents[i].pages * PAGE);
		if (call(cpu, OK))
			check_unmapped(cpu, innocents[i].pages);
	}
}

/* Has the device take a piece of a source, and then put it somewhere in a target. */
static void start_transfer(struct cpu *cpu)
{
	const struct innocent *source = &innocents[below(cpu, SOURCES)];
	u32 piece = (u32)below(cpu, 2 * source->pages);

	transfer.storing = false;
	transfer.from = source->gpa + PIECE * piece;
	transfer.target = SOURCES + (u32)below(cpu, INNOCENTS - SOURCES);
	transfer.piece = (u32)below(cpu, 2 * innocents[transfer.target].pages);
	edu_fetch(edu, source->iova + PIECE * piece, PIECE);
	transfer.busy = true;
}

/* Looks whether the device is done; then the other half of the transfer, or the end of it. */
static void continue_transfer(void)
{
	if (!transfer.busy || edu_busy(edu))
		return;
	if (transfer.storing) {
		origin[transfer.target][transfer.piece] = transfer.from;
		transfer.busy = false;
		innocent_copies++;
	} else {
		transfer.storing = true;
		edu_store(edu, innocents[transfer.target].iova + PIECE * transfer.piece, PIECE);
	}
}

/* Some innocent_copies one after the other, while nothing else happens. */
static void transfer_some(struct cpu *cpu)
{
	u32 i;

	for (i = 0; i < 8; i++) {
		start_transfer(cpu);
		while (transfer.busy)
			continue_transfer();
	}
}

u64 innocent_damage(void)
{
	u64 damage = 0, gpa;
	u32 i;

	for (i = 0; run.innocent && i < INNOCENTS; i++) {
		const struct innocent *one = &innocents[i];

		for (gpa = one->gpa; gpa < one->gpa + (one->pages + 1) * PAGE; gpa += 8) {
			u64 offset = gpa - one->gpa, from = i < SOURCES ? gpa : 0;

			if (i >= SOURCES && offset < one->pages * PAGE && origin[i][offset / PIECE])
				from = origin[i][offset / PIECE] + offset % PIECE;
			damage += *(volatile u64 *)gpa != (from ? pattern(from) : 0);
		}
	}
	return damage;
}

void innocent_begin(struct cpu *cpu)
{
	edu = edu_enable(run.innocent_slot);
	map_innocents(cpu);
	transfer_some(cpu);
}

void innocent_go_on(struct cpu *cpu)
{
	if (transfer.busy)
		continue_transfer();
	else if (one_in(cpu, 64))
		start_transfer(cpu);
}

void innocent_end(struct cpu *cpu)
{
	while (transfer.busy)
		continue_transfer();
	transfer_some(cpu);
	unmap_innocents(cpu);
}
