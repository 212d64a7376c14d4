/*
 * The protocol of the tracking table, as guest-shim/pvdma_table.h and hypercalls/cached.ts follow it, for spin to explore:
 * two vCPUs map and unmap pages at random, singly and as lists over two granules, while a reclaimer gives back what is
 * idle, and each map call reclaims when the host has no entry left. Every step that touches shared memory is one
 * statement here, and every order of them is tried.
 *
 * An entry is one 32-bit word; a d_step on it stands for one atomic instruction. The device is the ghost: held[] says
 * which pages a driver was told it may use.
 *
 * What must hold:
 *   - a page that a driver was given is mapped until the driver gives it back (asserted where the device uses it and
 *     where the host unmaps);
 *   - PINNED is never set on a page that is not mapped (asserted with every change of either);
 *   - when nobody holds the domain's lock, every page of a mapped granule is PINNED: no pin is lost, so that no later map
 *     of it needs a call (asserted when the lock is let go);
 *   - counts are 0 when nobody holds a page; and nobody waits for ever (spin's own check for deadlocks).
 *
 * Each MUTATE_… takes one thing out that the protocol needs; the test shows that spin then finds what goes wrong.
 */

#define GRANULES	2
#define GRANULE_PAGES	2
#define PAGES		(GRANULES * GRANULE_PAGES)
#ifndef ENTRIES
#define ENTRIES		1	/* granules that the host can have mapped at a time */
#endif

#define FIRST(granule)	((granule) * GRANULE_PAGES)
#define GRANULE(page)	((page) / GRANULE_PAGES)

/* The table: a word per page, its fields apart to be readable. */
typedef word {
	bool pinned;
	bool used;
	byte count;
};
word table[PAGES];

/* The host's own record, and what the IOMMU does. */
bool mapped[GRANULES];
bool reaches[GRANULES];
byte entries;
bool lock;

/* Drivers that were given a page and have not given it back. */
byte held[PAGES];

inline acquire()
{
#ifndef MUTATE_NO_LOCK
	atomic { !lock -> lock = true }
#else
	skip
#endif
}

inline release()
{
	d_step {
		/* with the lock held nobody else changes what is looked at here */
		assert(mapped[0] == reaches[0] && mapped[1] == reaches[1]);
		assert(!mapped[0] || (table[0].pinned && table[1].pinned));
		assert(!mapped[1] || (table[2].pinned && table[3].pinned));
		lock = false
	}
}

inline set_pinned(page)
{
	d_step {
		table[page].pinned = true;
		assert(reaches[GRANULE(page)])
	}
}

/* The backend's unmap. */
inline unmap(granule)
{
	d_step {
		assert(held[FIRST(granule)] == 0 && held[FIRST(granule) + 1] == 0);
		reaches[granule] = false;
#ifndef MUTATE_UNMAP_FIRST
		assert(!table[FIRST(granule)].pinned && !table[FIRST(granule) + 1].pinned);
#endif
		mapped[granule] = false;
		entries--
	}
}

/*
 * Gives a granule back if no page of it is counted: each entry from {PINNED, 0} to nothing by compare-and-swap, then the
 * unmap; at the first entry that is in use what was taken is set again. An entry that was used since the last look is
 * left for the next time, unless the caller is in need. The lock is held.
 */
inline reclaim(granule, in_need)
{
	taken = 0;
#ifdef MUTATE_UNMAP_FIRST
	if
	:: table[FIRST(granule)].count == 0 && table[FIRST(granule) + 1].count == 0 ->
		unmap(granule)
	:: else
	fi;
#endif
	do
	:: taken == GRANULE_PAGES -> break
	:: taken < GRANULE_PAGES ->
		/* the read … */
		d_step {
			seen_pinned = table[FIRST(granule) + taken].pinned;
			seen_used = table[FIRST(granule) + taken].used;
			seen_count = table[FIRST(granule) + taken].count
		};
		if
		:: seen_count > 0 -> break
		:: seen_count == 0 && seen_used && !in_need ->
			/* … and a swap that only forgets that it was used */
			d_step {
				if
				:: table[FIRST(granule) + taken].count == 0 &&
				   table[FIRST(granule) + taken].pinned == seen_pinned ->
					table[FIRST(granule) + taken].used = false
				:: else
				fi
			};
			break
		:: else ->
			/* … or the one that takes it */
			d_step {
				swapped = false;
				if
#ifndef MUTATE_NO_COMPARE
				:: table[FIRST(granule) + taken].count == seen_count &&
				   table[FIRST(granule) + taken].pinned == seen_pinned &&
				   table[FIRST(granule) + taken].used == seen_used ->
#else
				:: true ->
#endif
					table[FIRST(granule) + taken].pinned = false;
					table[FIRST(granule) + taken].used = false;
					swapped = true
#ifndef MUTATE_NO_COMPARE
				:: else
#endif
				fi
			};
			if
			:: swapped -> taken++
			:: else -> break
			fi
		fi
	od;
	if
#ifdef MUTATE_UNMAP_FIRST
	:: taken == GRANULE_PAGES -> skip
#else
	:: taken == GRANULE_PAGES -> unmap(granule)
#endif
	:: else ->
#ifndef MUTATE_NO_ROLLBACK
		do
		:: taken == 0 -> break
		:: else ->
			taken--;
			set_pinned(FIRST(granule) + taken)
		od
#endif
		skip
	fi;
	taken = 0
}

/* Makes a granule reachable; `failed` when the host has no entry. The lock is held. */
inline map_granule(granule)
{
	if
	:: mapped[granule] -> skip
	:: else ->
		if
		:: entries == ENTRIES && mapped[1 - granule] -> reclaim(1 - granule, true)
		:: else
		fi;
		if
		:: entries == ENTRIES -> failed = true
		:: else ->
#ifdef MUTATE_PINNED_FIRST
			set_pinned(FIRST(granule));
#endif
			d_step {
				reaches[granule] = true;
				mapped[granule] = true;
				entries++
			};
			set_pinned(FIRST(granule));
			set_pinned(FIRST(granule) + 1)
		fi
	fi
}

/* The map call for pages first to last, which the guest has counted. */
inline map_call()
{
	acquire();
	failed = false;
	map_granule(GRANULE(first));
	if
	:: !failed && GRANULE(last) != GRANULE(first) -> map_granule(GRANULE(last))
	:: else
	fi;
	release()
}

inline uncount(page)
{
	d_step {
		assert(table[page].count > 0);
		table[page].count--
	}
}

/* For each page from first to last, at once: it is the ghost's. */
inline hold(by)
{
	atomic {
		page = first;
		do
		:: page > last -> break
		:: else -> held[page] = held[page] + by; page++
		od
	}
}

proctype vcpu()
{
	byte first, last, page;
	bool missing, failed, was_pinned, was_used;
	/* of a reclaim within a call of this vCPU */
	byte taken, seen_count;
	bool seen_pinned, seen_used, swapped;

end:	do
	:: true ->
		/* one page of four, or two that follow each other, in one granule or in both */
		if
		:: first = 0; last = 0
		:: first = 1; last = 1
		:: first = 2; last = 2
		:: first = 0; last = 1
		:: first = 1; last = 2
		fi;
		missing = false;
		page = first;
		do
		:: page > last -> break
		:: else ->
#ifdef MUTATE_TWO_STEPS
			/* read, add, write: an add without a lock prefix */
			d_step {
				was_pinned = table[page].pinned;
				was_used = table[page].used;
				seen_count = table[page].count
			};
			d_step {
				table[page].pinned = was_pinned;
				table[page].used = was_used;
				table[page].count = seen_count + 1
			};
#elif !defined(MUTATE_LOOK_FIRST)
			d_step {
				was_pinned = table[page].pinned;
				was_used = table[page].used;
				table[page].count++
			};
#else
			d_step {
				was_pinned = table[page].pinned;
				was_used = table[page].used
			};
			table[page].count++;
#endif
			missing = missing || !was_pinned;
			if
			:: was_pinned && !was_used -> table[page].used = true
			:: else
			fi;
			page++
		od;
		if
		:: missing -> map_call()
		:: else
		fi;
		if
		:: !failed ->
			hold(1);
			/* the device reads and writes the pages */
			assert(reaches[GRANULE(first)] && reaches[GRANULE(last)]);
			hold(-1)
		:: else
		fi;
		page = first;
		do
		:: page > last -> break
		:: else -> uncount(page); page++
		od;
		/* values nobody looks at again would make states differ */
		atomic { first = 0; last = 0; page = 0; was_pinned = false; was_used = false; missing = false; failed = false;
			 seen_pinned = false; seen_used = false; seen_count = 0; swapped = false; taken = 0 }
	od
}

/* Looks at what is mapped, over and over: the sweep for what is idle. */
proctype reclaimer()
{
	byte granule, taken, seen_count;
	bool seen_pinned, seen_used, swapped;

end:	do
	:: true ->
		if
		:: granule = 0
		:: granule = 1
		fi;
		acquire();
		if
		:: mapped[granule] -> reclaim(granule, false)
		:: else
		fi;
		release();
		atomic { granule = 0; seen_pinned = false; seen_used = false; seen_count = 0; swapped = false; taken = 0 }
	od
}

init {
	atomic {
		run vcpu();
		run vcpu();
		run reclaimer()
	}
}
