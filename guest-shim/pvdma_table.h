/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * The guest's side of the tracking table: what a map and an unmap of a cached page
 * are. No lock, no call; from any context and any CPU. hypercalls/abi.ts says what
 * the bits mean, test/model/tracking.pml why the steps are in this order.
 */
#ifndef PVDMA_TABLE_H
#define PVDMA_TABLE_H

/*
 * The compiler's operations, not the kernel's: whoever is on the other side runs on
 * a CPU of the host, and the kernel leaves the lock prefix of its own operations out
 * when this guest has one CPU.
 */
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

/* The table of a device's domain. */
struct pvdma_table {
	u32 *entries;		/* by page frame; NULL: the device has none */
	u64 pages;		/* entries */
	u64 gpa;
};

/*
 * A count from which on maps are refused, the highest bit of a count: each CPU may be
 * past it by one.
 */
#define PVDMA_TABLE_COUNT_MAX	((PVDMA_TABLE_COUNT_MASK >> 1) + 1)

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

/*
 * Counts a page that the host need not hear of, and says that it is used. Else false,
 * and it is counted as well; @before is what the entry held.
 */
static inline bool pvdma_entry_count(u32 *entry, u32 *before)
{
	*before = pvdma_entry_add_one(entry);
	if ((*before & (PVDMA_TABLE_PINNED | PVDMA_TABLE_COUNT_MAX)) != PVDMA_TABLE_PINNED)
		return false;
	if (!(*before & PVDMA_TABLE_USED))
		pvdma_entry_use(entry);
	return true;
}

/* Whether the table has entries for all pages of [@gpa, @bytes), of which there are some. */
static inline bool pvdma_table_covers(const struct pvdma_table *table, u64 gpa, u64 bytes)
{
	u64 first = gpa >> PVDMA_PAGE_SHIFT;

	return bytes && first < table->pages &&
	       pvdma_pages(gpa, bytes) <= table->pages - first;
}

/* Whether a range lies in one page, and that page has an entry. */
static inline bool pvdma_table_is_one(const struct pvdma_table *table, u64 gpa, u64 bytes)
{
	u64 offset = gpa & (PVDMA_PAGE_BYTES - 1);

	return gpa >> PVDMA_PAGE_SHIFT < table->pages && bytes - 1 < PVDMA_PAGE_BYTES - offset;
}

/**
 * pvdma_table_count_one() - pvdma_table_count() in the usual case, in a few instructions
 *
 * Return: false, and nothing is counted, when it is another: more pages than one, or
 * one that the host has to hear of. To the protocol that is a map that fails at once.
 */
static inline bool pvdma_table_count_one(const struct pvdma_table *table, u64 gpa,
					 u64 bytes)
{
	u32 *entry;
	u32 before;

	if (!pvdma_table_is_one(table, gpa, bytes))
		return false;
	entry = &table->entries[gpa >> PVDMA_PAGE_SHIFT];
	if (pvdma_entry_count(entry, &before))
		return true;
	pvdma_entry_uncount(entry);
	return false;
}

/** pvdma_table_uncount_one() - its counterpart; false: pvdma_table_uncount() is to see */
static inline bool pvdma_table_uncount_one(const struct pvdma_table *table, u64 gpa,
					   u64 bytes)
{
	return pvdma_table_is_one(table, gpa, bytes) &&
	       pvdma_entry_uncount(&table->entries[gpa >> PVDMA_PAGE_SHIFT]);
}

/**
 * pvdma_table_uncount() - the device no longer needs [@gpa, @bytes)
 *
 * Return: false, and nothing is changed, when a page of it is not counted: the
 * caller unmaps what it has not mapped.
 */
static inline bool pvdma_table_uncount(const struct pvdma_table *table, u64 gpa,
				       u64 bytes)
{
	u64 first = gpa >> PVDMA_PAGE_SHIFT, page, end;
	bool all = true;

	if (!pvdma_table_covers(table, gpa, bytes))
		return false;
	end = first + pvdma_pages(gpa, bytes);
	/* first a look: a count that is 0 for a moment is the host's to reclaim */
	if (end - first > 1) {
		for (page = first; page < end; page++) {
			if (!(pvdma_entry_read(&table->entries[page]) & PVDMA_TABLE_COUNT_MASK))
				return false;
		}
	}
	for (page = first; page < end; page++)
		all &= pvdma_entry_uncount(&table->entries[page]);
	return all;
}

/**
 * pvdma_table_count() - the device needs every page of [@gpa, @bytes)
 * @missing: set when a page is not pinned, so that the host has to be called; left
 *	     alone otherwise
 *
 * Return: a status, and with another than ok nothing is counted: invalid when the
 * range is not the table's, a limit when a page is mapped too often.
 */
static inline u32 pvdma_table_count(const struct pvdma_table *table, u64 gpa,
				    u64 bytes, bool *missing)
{
	u64 first = gpa >> PVDMA_PAGE_SHIFT, page, end;

	if (!pvdma_table_covers(table, gpa, bytes))
		return PVDMA_STATUS_INVALID;
	end = first + pvdma_pages(gpa, bytes);
	for (page = first; page < end; page++) {
		u32 *entry = &table->entries[page];
		u32 before;

		if (pvdma_entry_count(entry, &before))
			continue;
		if ((before & PVDMA_TABLE_COUNT_MASK) >= PVDMA_TABLE_COUNT_MAX) {
			pvdma_table_uncount(table, first << PVDMA_PAGE_SHIFT,
					    (page - first + 1) << PVDMA_PAGE_SHIFT);
			return PVDMA_STATUS_LIMIT;
		}
		*missing = true;
	}
	return PVDMA_STATUS_OK;
}

#endif /* PVDMA_TABLE_H */
