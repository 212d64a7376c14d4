/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * The guest's side of the tracking table: what a map and an unmap of a cached page
 * are. No lock, no call; from any context and any CPU. hypercalls/abi.ts says what
 * the bits mean, test/model/tracking.pml why the steps are in this order.
 */
#ifndef PVDMA_TABLE_H
#define PVDMA_TABLE_H

#ifdef __KERNEL__
#include <linux/atomic.h>
#include <linux/compiler.h>

/* x86's read-modify-write operations with a lock prefix order everything */
static inline u32 pvdma_entry_add_one(u32 *entry)
{
	return xadd(entry, 1);
}

static inline bool pvdma_entry_swap(u32 *entry, u32 *seen, u32 value)
{
	return try_cmpxchg(entry, seen, value);
}

static inline u32 pvdma_entry_read(const u32 *entry)
{
	return READ_ONCE(*entry);
}
#else
static inline u32 pvdma_entry_add_one(u32 *entry)
{
	return __atomic_fetch_add(entry, 1, __ATOMIC_SEQ_CST);
}

static inline bool pvdma_entry_swap(u32 *entry, u32 *seen, u32 value)
{
	return __atomic_compare_exchange_n(entry, seen, value, false, __ATOMIC_SEQ_CST,
					   __ATOMIC_SEQ_CST);
}

static inline u32 pvdma_entry_read(const u32 *entry)
{
	return __atomic_load_n(entry, __ATOMIC_SEQ_CST);
}
#endif

/* The table of a device's domain. */
struct pvdma_table {
	u32 *entries;		/* by page frame; NULL: the device has none */
	u64 pages;		/* entries */
	u64 gpa;
};

/* A count from which on maps are refused: each CPU may be past it by one. */
#define PVDMA_TABLE_COUNT_MAX	(PVDMA_TABLE_COUNT_MASK >> 1)

/* Takes one from a page's count; false, and nothing changed, when it is 0. */
static inline bool pvdma_entry_uncount(u32 *entry)
{
	u32 seen = pvdma_entry_read(entry);

	do {
		if (!(seen & PVDMA_TABLE_COUNT_MASK))
			return false;
	} while (!pvdma_entry_swap(entry, &seen, seen - 1));
	return true;
}

/* Says that the page was used; the host forgets it now and then. */
static inline void pvdma_entry_use(u32 *entry)
{
	u32 seen = pvdma_entry_read(entry);

	while (!pvdma_entry_swap(entry, &seen, seen | PVDMA_TABLE_USED))
		;
}

/**
 * pvdma_table_uncount() - the device no longer needs [@gpa, @bytes)
 *
 * Return: how many of the pages were not counted: the caller unmaps what it has
 * not mapped.
 */
static inline u64 pvdma_table_uncount(const struct pvdma_table *table, u64 gpa,
				      u64 bytes)
{
	u64 end = (gpa >> PVDMA_PAGE_SHIFT) + pvdma_pages(gpa, bytes);
	u64 page, wrong = 0;

	for (page = gpa >> PVDMA_PAGE_SHIFT; page < end; page++)
		wrong += page >= table->pages ||
			 !pvdma_entry_uncount(&table->entries[page]);
	return wrong;
}

/**
 * pvdma_table_count() - the device needs every page of [@gpa, @bytes), at least 1 byte
 * @missing: set when a page is not pinned, so that the host has to be called; left
 *	     alone otherwise
 *
 * Return: false, and nothing is counted, when the range is not the table's or a
 * page is mapped too often.
 */
static inline bool pvdma_table_count(const struct pvdma_table *table, u64 gpa,
				     u64 bytes, bool *missing)
{
	u64 first = gpa >> PVDMA_PAGE_SHIFT;
	u64 pages = pvdma_pages(gpa, bytes);
	u64 page;

	if (first >= table->pages || pages > table->pages - first)
		return false;
	for (page = first; page < first + pages; page++) {
		u32 *entry = &table->entries[page];
		u32 before = pvdma_entry_add_one(entry);

		if ((before & PVDMA_TABLE_COUNT_MASK) >= PVDMA_TABLE_COUNT_MAX) {
			pvdma_table_uncount(table, first << PVDMA_PAGE_SHIFT,
					    (page - first + 1) << PVDMA_PAGE_SHIFT);
			return false;
		}
		if (!(before & PVDMA_TABLE_PINNED))
			*missing = true;
		else if (!(before & PVDMA_TABLE_USED))
			pvdma_entry_use(entry);
	}
	return true;
}

#endif /* PVDMA_TABLE_H */
