// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * Mappings by bus address, and the idle ones by memory and by age, in an array that
 * never grows: maps come from contexts that cannot wait for memory.
 */
#include "pvdma_lazy.h"

_Static_assert(PVDMA_LAZY_RECORDS <= 65536 && PVDMA_LAZY_ENTRIES <= 65536,
	       "places are 16 bits");

/* 2^64 by the golden ratio: multiplicative hashing (Knuth, TAOCP 6.4). */
#define GOLDEN	0x9e3779b97f4a7c15ull

/* By page. */
static u32 bucket(u64 address)
{
	return (u32)((address >> PVDMA_PAGE_SHIFT) * GOLDEN >> 32) %
	       PVDMA_LAZY_BUCKETS;
}

/* Of all entries, since many lists may begin, or end, alike. */
static u64 key_of(const struct pvdma_list *list)
{
	u64 key = list->count;
	u32 i;

	for (i = 0; i < list->count; i++) {
		key = (key ^ list->entries[i].address) * GOLDEN;
		key = (key ^ key >> 32 ^ list->entries[i].bytes) * GOLDEN;
	}
	return key;
}

void pvdma_lazy_start(struct pvdma_lazy *lazy)
{
	u32 i;

	for (i = 0; i < PVDMA_LAZY_BUCKETS; i++) {
		lazy->by_iova[i] = 0;
		lazy->by_key[i] = 0;
	}
	for (i = 1; i < PVDMA_LAZY_RECORDS; i++)
		lazy->records[i].iova_next = (i + 1) % PVDMA_LAZY_RECORDS;
	lazy->free = 1;
	for (i = 1; i < PVDMA_LAZY_ENTRIES; i++)
		lazy->entry_next[i] = (i + 1) % PVDMA_LAZY_ENTRIES;
	lazy->free_entry = 1;
	lazy->free_entries = PVDMA_LAZY_ENTRIES - 1;
	lazy->idle = 0;
	lazy->oldest = 0;
	lazy->newest = 0;
}

/* Takes a record out of the idle ones. */
static void not_idle(struct pvdma_lazy *lazy, u16 at)
{
	struct pvdma_record *record = &lazy->records[at];
	u16 *link;

	if (record->key != PVDMA_LAZY_UNKNOWN) {
		for (link = &lazy->by_key[bucket(record->key)]; *link != at;)
			link = &lazy->records[*link].key_next;
		*link = record->key_next;
	}
	if (record->older)
		lazy->records[record->older].newer = record->newer;
	else
		lazy->oldest = record->newer;
	if (record->newer)
		lazy->records[record->newer].older = record->older;
	else
		lazy->newest = record->older;
	record->idle = false;
	lazy->idle--;
}

/* Takes a record that is not idle out of those by iova; it is free. */
static void forget(struct pvdma_lazy *lazy, u16 at)
{
	struct pvdma_record *record = &lazy->records[at];
	u16 *link = &lazy->by_iova[bucket(record->iova)];

	while (*link != at)
		link = &lazy->records[*link].iova_next;
	*link = record->iova_next;
	record->iova_next = lazy->free;
	lazy->free = at;
	if (record->entries) {
		lazy->entry_next[record->last_entry] = lazy->free_entry;
		lazy->free_entry = record->first_entry;
		lazy->free_entries += record->entries;
	}
}

/* No two mappings have a page of bus addresses in common. */
static u16 find(const struct pvdma_lazy *lazy, u64 iova)
{
	u16 at = lazy->by_iova[bucket(iova)];

	while (at && (lazy->records[at].iova ^ iova) >> PVDMA_PAGE_SHIFT)
		at = lazy->records[at].iova_next;
	return at;
}

/* A record of a mapping that was made, without a list's entries; 0: no room. */
static u16 made(struct pvdma_lazy *lazy, u64 key, u64 bytes, u32 flags, u64 iova)
{
	/* an iova is one mapping's until the host has unmapped it: so the host has */
	u16 gone = find(lazy, iova);
	u16 *head = &lazy->by_iova[bucket(iova)];
	struct pvdma_record *record;
	u16 at;

	if (gone && lazy->records[gone].idle)
		not_idle(lazy, gone);
	if (gone)
		forget(lazy, gone);
	at = lazy->free;
	if (!at)
		return 0;
	record = &lazy->records[at];
	lazy->free = record->iova_next;
	record->key = key;
	record->iova = iova;
	record->bytes = bytes;
	record->flags = flags;
	record->idle = false;
	record->entries = 0;
	record->iova_next = *head;
	*head = at;
	return at;
}

void pvdma_lazy_made(struct pvdma_lazy *lazy, u64 gpa, u64 bytes, u32 flags, u64 iova)
{
	made(lazy, gpa, bytes, flags, iova);
}

void pvdma_lazy_made_list(struct pvdma_lazy *lazy, const struct pvdma_list *list,
			  u32 flags, u64 iova)
{
	u16 at = made(lazy, PVDMA_LAZY_UNKNOWN, list->pages << PVDMA_PAGE_SHIFT, flags, iova);
	struct pvdma_record *record = &lazy->records[at];
	u16 place;
	u32 i;

	if (!at || list->count > lazy->free_entries)
		return;
	place = lazy->free_entry;
	record->key = key_of(list);
	record->entries = list->count;
	record->first_entry = place;
	for (i = 0; i < list->count; i++) {
		lazy->entries[place] = list->entries[i];
		record->last_entry = place;
		place = lazy->entry_next[place];
	}
	lazy->free_entry = place;
	lazy->free_entries -= list->count;
}

static bool has_entries(const struct pvdma_lazy *lazy, const struct pvdma_record *record,
			const struct pvdma_list *list)
{
	u16 place = record->first_entry;
	u32 i;

	if (record->entries != list->count)
		return false;
	for (i = 0; i < list->count; i++, place = lazy->entry_next[place]) {
		if (lazy->entries[place].address != list->entries[i].address ||
		    lazy->entries[place].bytes != list->entries[i].bytes)
			return false;
	}
	return true;
}

/* A buffer is a list of no entries here. */
static bool reuse(struct pvdma_lazy *lazy, u64 key, u64 bytes,
		  const struct pvdma_list *list, u32 flags, u64 iova_max, u64 *iova)
{
	u16 at;

	for (at = lazy->by_key[bucket(key)]; at; at = lazy->records[at].key_next) {
		const struct pvdma_record *record = &lazy->records[at];

		if (record->key != key || record->bytes != bytes ||
		    record->flags != flags || record->iova > iova_max ||
		    bytes - 1 > iova_max - record->iova ||
		    !has_entries(lazy, record, list))
			continue;
		*iova = record->iova;
		not_idle(lazy, at);
		return true;
	}
	return false;
}

bool pvdma_lazy_reuse(struct pvdma_lazy *lazy, u64 gpa, u64 bytes, u32 flags,
		      u64 iova_max, u64 *iova)
{
	static const struct pvdma_list none = { .count = 0 };

	return reuse(lazy, gpa, bytes, &none, flags, iova_max, iova);
}

bool pvdma_lazy_reuse_list(struct pvdma_lazy *lazy, const struct pvdma_list *list,
			   u32 flags, u64 iova_max, u64 *iova)
{
	return reuse(lazy, key_of(list), list->pages << PVDMA_PAGE_SHIFT, list, flags,
		     iova_max, iova);
}

enum pvdma_idled pvdma_lazy_idle(struct pvdma_lazy *lazy, u64 iova, u64 bytes, u64 now)
{
	u16 at = find(lazy, iova);
	struct pvdma_record *record = &lazy->records[at];
	u16 *head;

	if (!at)
		return PVDMA_NOT_KNOWN;
	if (record->idle)
		return PVDMA_IDLE_ALREADY;
	if (pvdma_pages(record->iova, record->bytes) != pvdma_pages(iova, bytes))
		return PVDMA_NOT_KNOWN;

	if (record->key != PVDMA_LAZY_UNKNOWN) {
		head = &lazy->by_key[bucket(record->key)];
		record->key_next = *head;
		*head = at;
	}
	record->older = lazy->newest;
	record->newer = 0;
	if (lazy->newest)
		lazy->records[lazy->newest].newer = at;
	else
		lazy->oldest = at;
	lazy->newest = at;
	record->since = now;
	record->idle = true;
	lazy->idle++;
	return PVDMA_IDLE;
}

u32 pvdma_lazy_take(struct pvdma_lazy *lazy, struct pvdma_entry *entries, u32 max,
		    u64 until)
{
	u32 count = 0;

	while (count < max && lazy->oldest) {
		u16 at = lazy->oldest;
		const struct pvdma_record *record = &lazy->records[at];

		/* times are compared by their distance, so that a clock may wrap */
		if ((s64)(until - record->since) < 0)
			break;
		not_idle(lazy, at);
		forget(lazy, at);
		entries[count].address = record->iova;
		entries[count].bytes = record->bytes;
		count++;
	}
	return count;
}
