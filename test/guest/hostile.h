/* SPDX-License-Identifier: MIT */
/*
 * What the parts of the hostile guest share (see hostile.c): its CPUs, one call
 * with everything that is known of its answer, and the innocent device.
 */
#ifndef GUEST_HOSTILE_H
#define GUEST_HOSTILE_H

#include "lib.h"

#define PAGE		PVDMA_PAGE_BYTES
#define GIB		(1ull << 30)
#define HIGH		(1ull << 32)
#define READ_WRITE	(PVDMA_MAP_READ | PVDMA_MAP_WRITE)
#define COUNT(array)	(sizeof(array) / sizeof((array)[0]))

/* RAM for mappings: a piece per CPU, one for all, one for the innocent device. */
#define ARENA		0x1000000ull
#define ARENA_BYTES	0x400000ull
#define ARENA_OF(cpu)	(ARENA + ARENA_BYTES * (cpu))
#define ARENA_SHARED	ARENA_OF(CPUS_MAX)
#define ARENA_INNOCENT	ARENA_OF(CPUS_MAX + 1)
#define ARENA_END	ARENA_OF(CPUS_MAX + 2)

/* What this run is like. Handles are 0 where there is no such device. */
struct run {
	struct pvdma_host host;
	u64 seed;
	u64 calls;			/* per CPU */
	u32 cpus;
	bool limits;			/* the host may be short of mappings */
	bool shared_domain;		/* of the attackers and the innocent device */
	u32 devices;
	u32 attacker;
	u32 second;			/* attacker, whose mappings are released now and then */
	u32 innocent;
	u32 innocent_slot;
	u32 handle_of_slot[32];
	u32 ranges;			/* of bus addresses: run_ranges */
};

extern struct run run;
extern struct pvdma_iova_range run_ranges[PVDMA_LIST_ENTRIES];

#define CALLS		(PVDMA_CALL_TABLE + 1)
#define CLASSES		(PVDMA_STATUS_GONE + 1)

/* A mapping in a word, for tables that other CPUs look at: first page and pages. */
typedef u64 mapping;
#define MAPPING(iova, pages)	((iova) | (pages))
#define MAPPING_IOVA(m)		((m) & ~(PAGE - 1))
#define MAPPING_PAGES(m)	((m) & (PAGE - 1))

#define OWN_MAPPINGS	24

struct cpu {
	u32 number;
	u64 random;
	u64 made;			/* calls, but those from CPL 3 */
	struct registers now, asked;
	u64 count[CALLS][CLASSES];
	u64 pages[CALLS];
	u64 refused_cpl, refused_unknown;
	u64 limits[64];			/* by errno */
	u32 wrong;
	mapping own[OWN_MAPPINGS];	/* live as long as they are here */
};

extern struct cpu cpu_data[CPUS_MAX];

/* xorshift64* (Vigna 2016) */
static inline u64 random(struct cpu *cpu)
{
	u64 x = cpu->random;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	cpu->random = x;
	return x * 0x2545f4914f6cdd1dull;
}

/* 0 to n - 1; n below 2^32 */
static inline u64 below(struct cpu *cpu, u64 n)
{
	return (random(cpu) >> 32) * n >> 32;
}

static inline bool one_in(struct cpu *cpu, u32 n)
{
	return below(cpu, n) == 0;
}

#define PICK(cpu, array)	((array)[below(cpu, COUNT(array))])

/* Classes that an answer may have. */
#define OK	(1u << PVDMA_STATUS_OK)
#define LIMIT	(1u << PVDMA_STATUS_LIMIT)
#define INVALID	(1u << PVDMA_STATUS_INVALID)

/** set_call() - the registers of a call; those it does not look at are anything */
void set_call(struct cpu *cpu, u32 number, u64 handle, u64 rsi, u64 r8);
void set_map(struct cpu *cpu, u32 number, u64 handle, u64 rsi, u64 r8, u64 iova_max, u64 flags);

/**
 * call() - make the call in the registers, and look at what holds of every answer
 * @allowed: the classes it may have
 *
 * Now and then something that is no call goes before it, or the same from CPL 3.
 * Return: was it ok?
 */
bool call(struct cpu *cpu, u32 allowed);

/** wrong() - the answer to the last call cannot be */
void wrong(struct cpu *cpu, const char *what);

/** check_iova() - look at the bus address of a map that was ok; returns its first page */
u64 check_iova(struct cpu *cpu, u64 offset, u64 pages);

/** check_unmapped() - look at an unmap that was ok */
void check_unmapped(struct cpu *cpu, u64 pages);

/** pages_done() - count what the last call mapped or unmapped */
void pages_done(struct cpu *cpu, u64 pages);

/** report() - all counts, and a line to sum them up */
void report(void);

static inline bool overlaps(mapping m, u64 first, u64 end)
{
	u64 iova = MAPPING_IOVA(m);

	return m && iova < end && first < iova + MAPPING_PAGES(m) * PAGE;
}

/* The innocent device. It has no mappings before innocent_begin() and after innocent_end(). */

/** innocent_begin() - maps its memory, and has it copy some */
void innocent_begin(struct cpu *cpu);

/** innocent_go_on() - has it copy a bit more, without waiting for it */
void innocent_go_on(struct cpu *cpu);

/** innocent_end() - has it copy some more, and unmaps its memory */
void innocent_end(struct cpu *cpu);

/** innocent_damage() - words of its memory that are not what they have to be */
u64 innocent_damage(void);

/** innocent_any() - one of its mappings; 0: none */
mapping innocent_any(struct cpu *cpu);

/** innocent_overlaps() - is any of this a bus address of its? */
bool innocent_overlaps(u64 first, u64 end);

extern u64 innocent_copies;

#endif /* GUEST_HOSTILE_H */
