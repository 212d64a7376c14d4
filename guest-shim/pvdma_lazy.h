/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * The guest's side of policy lazy: what a driver has unmapped stays mapped at the
 * host for a moment, idle, so that unmaps go there many at a time, and a buffer that
 * is mapped again meanwhile needs no call at all. Keeps the books only: the caller
 * makes the calls, and holds a lock of its own around each function here.
 *
 * One book for a device, not one for each CPU: drivers map a buffer on one CPU and
 * unmap it on another, where its interrupt came, and the next map of it, wherever that
 * is, has to find it. CPUs that find theirs at once wait for each other, a list for as
 * long as it takes to compare its entries; who wants more than that has policy cached.
 */
#ifndef PVDMA_LAZY_H
#define PVDMA_LAZY_H

#include "pvdma_core.h"

/* Mappings of a device that are remembered, and one; those beyond are unmapped at once. */
#define PVDMA_LAZY_RECORDS	4096u
#define PVDMA_LAZY_BUCKETS	4096u

/*
 * Entries of a device's lists that are remembered, and one: 255 lists of 64, those in
 * use among them. A list for which there is no room is not found again.
 */
#define PVDMA_LAZY_ENTRIES	16384u

/* In place of a key: a list whose entries are not remembered. */
#define PVDMA_LAZY_UNKNOWN	(~0ull)

/* Records and entries are named by their place in the array; the place 0 is nobody's. */
struct pvdma_record {
	u64 key;		/* a buffer: gpa of the first byte; a list: of all its
				 * entries, or PVDMA_LAZY_UNKNOWN */
	u64 iova;		/* of the first byte; a list: of the first page */
	u64 bytes;		/* a list: of its pages */
	u64 since;		/* idle since, in the caller's clock */
	u32 flags;		/* PVDMA_MAP_* */
	bool idle;
	u16 entries;		/* of a list, how many; 0: no list, or unknown */
	u16 first_entry, last_entry;
	u16 iova_next;		/* in its bucket by iova; in the list of free ones */
	u16 key_next;		/* in its bucket by key, if idle and not unknown */
	u16 older, newer;	/* of the idle ones */
};

struct pvdma_lazy {
	u32 idle;		/* records that are */
	u32 free_entries;	/* how many */
	u16 free;
	u16 free_entry;
	u16 oldest, newest;	/* of the idle ones */
	u16 by_iova[PVDMA_LAZY_BUCKETS];
	u16 by_key[PVDMA_LAZY_BUCKETS];
	struct pvdma_record records[PVDMA_LAZY_RECORDS];
	struct pvdma_entry entries[PVDMA_LAZY_ENTRIES];
	u16 entry_next[PVDMA_LAZY_ENTRIES];	/* of the same list; of the free ones */
};

/* What became of a mapping that its driver no longer needs. */
enum pvdma_idled {
	PVDMA_IDLE,		/* it is idle: nothing more to do now */
	PVDMA_NOT_KNOWN,	/* not remembered, or not these pages: the host has to say */
	PVDMA_IDLE_ALREADY,	/* unmapped twice */
};

/** pvdma_lazy_start() - begin with no mappings. The memory may hold anything. */
void pvdma_lazy_start(struct pvdma_lazy *lazy);

/**
 * pvdma_lazy_made() - remember a mapping that was made
 *
 * Without room for it nothing happens: it will not be known.
 */
void pvdma_lazy_made(struct pvdma_lazy *lazy, u64 gpa, u64 bytes, u32 flags, u64 iova);

/**
 * pvdma_lazy_made_list() - remember a list that was mapped
 * @list: its entries, in the call page
 * @iova: first page of its range
 *
 * As pvdma_lazy_made(); without room for its entries it will be known, and not found.
 */
void pvdma_lazy_made_list(struct pvdma_lazy *lazy, const struct pvdma_list *list,
			  u32 flags, u64 iova);

/**
 * pvdma_lazy_reuse() - look for an idle mapping of the same bytes and flags
 * @iova_max: last address the device can emit
 * @iova: its bus address, set on success only
 *
 * Return: true when there was one; it is the caller's again.
 */
bool pvdma_lazy_reuse(struct pvdma_lazy *lazy, u64 gpa, u64 bytes, u32 flags,
		      u64 iova_max, u64 *iova);

/**
 * pvdma_lazy_reuse_list() - look for an idle list of the same entries in the same order
 * @iova: first page of its range, set on success only
 */
bool pvdma_lazy_reuse_list(struct pvdma_lazy *lazy, const struct pvdma_list *list,
			   u32 flags, u64 iova_max, u64 *iova);

/**
 * pvdma_lazy_idle() - the driver unmaps
 *
 * @iova and @bytes as the mapping was made, to the page: so the host has it.
 */
enum pvdma_idled pvdma_lazy_idle(struct pvdma_lazy *lazy, u64 iova, u64 bytes, u64 now);

/**
 * pvdma_lazy_take() - forget the longest idle mappings, to unmap them
 * @entries: filled with their iovas and lengths, at most @max
 * @until: only what has been idle since this time or before
 *
 * Return: how many.
 */
u32 pvdma_lazy_take(struct pvdma_lazy *lazy, struct pvdma_entry *entries, u32 max,
		    u64 until);

#endif /* PVDMA_LAZY_H */
