// SPDX-License-Identifier: MIT
/*
 * A guest that attacks its host: every CPU makes random and nearly right calls,
 * all at once, for devices that it never starts ("attackers"), while an innocent
 * device, QEMU's edu, reads and writes memory through mappings of its own. Prints
 *
 *   guest: wrong ...		an answer that cannot be (the first few of them)
 *   count NAME calls=N errors=N pages=N	by call, as the host has to have counted
 *   status NAME N, refused NAME N
 *   limit ERRNO N		answers of that class, by errno modulo 64
 *   guest: storm wrong=N ...	and waits for a byte on COM1
 *
 * Command line: seed=N calls=N (in all), limits when the host may run out of
 * mappings, own-domain when the innocent device does not share the attackers' domain.
 *
 * Everybody unmaps everything all the time, and still nearly every answer is known
 * beforehand, for the number of pages of a mapping tells whose it is:
 *
 *   a power of two		anybody's; it may be gone at any time
 *   3 * (1 + cpu + n * k)	that CPU's, n CPUs: the others attack it with other sizes only
 *   5, 10, 20			the innocent device's: nobody succeeds with any of them
 */
#include "edu.h"
#include "hostile.h"

#define ANY_IOVA	(~0ull)

/* --- what is right -------------------------------------------------------- */

static bool in_ram(u64 gpa, u64 bytes)
{
	if (gpa < guest_ram.low_end)
		return bytes <= guest_ram.low_end - gpa;
	return gpa >= HIGH && gpa < guest_ram.high_end && bytes <= guest_ram.high_end - gpa;
}

static bool right_handle(u64 handle)
{
	return handle >= 1 && handle <= run.devices;
}

static bool right_flags(u64 flags)
{
	return flags <= (READ_WRITE | PVDMA_MAP_ALIGN) && flags & READ_WRITE;
}

static bool right_length(u64 address, u64 bytes)
{
	return bytes >= 1 && bytes <= GIB && pvdma_pages(address, bytes) <= PVDMA_MAP_PAGES_MAX;
}

static bool power_of_two(u64 n)
{
	return n && !(n & (n - 1));
}

/* --- a CPU's own mappings ------------------------------------------------- */

static struct pvdma_entry call_pages[CPUS_MAX][PVDMA_LIST_ENTRIES] __attribute__((aligned(4096)));

static struct pvdma_entry *call_page(struct cpu *cpu)
{
	return call_pages[cpu->number];
}

static void set_entry(struct cpu *cpu, u32 index, u64 address, u64 bytes)
{
	call_page(cpu)[index] = (struct pvdma_entry) { address, bytes };
}

/* Pages of a mapping that nobody else makes or unmaps; at most `most'. */
static u64 own_size(struct cpu *cpu, u64 most)
{
	u64 step = 3 * run.cpus;

	return 3 * (1 + cpu->number) + step * below(cpu, 1 + (most - 3 * (1 + cpu->number)) / step);
}

/* Where `pages' pages (512 at most) of RAM are. */
static u64 ram_place(struct cpu *cpu, u64 pages)
{
	u64 arena = one_in(cpu, 4) ? ARENA_SHARED : ARENA_OF(cpu->number);

	switch (below(cpu, 16)) {
	case 0:
		return guest_ram.low_end - pages * PAGE;
	case 1:
		return guest_ram.high_end ? HIGH : 0;
	case 2:
		return (guest_ram.high_end ? guest_ram.high_end : guest_ram.low_end) - pages * PAGE;
	case 3:
		/* a device could write what the host reads in a call */
		return (u64)call_page(cpu);
	default:
		return arena + PAGE * below(cpu, ARENA_BYTES / PAGE - pages);
	}
}

static u64 any_limit(struct cpu *cpu)
{
	static const u64 iova_max[] = { ANY_IOVA, ANY_IOVA, 0xffffffff, (1ull << 44) - 1, 1ull << 53, 0xfffffff };

	return PICK(cpu, iova_max);
}

static u64 any_access(struct cpu *cpu)
{
	static const u64 flags[] = { PVDMA_MAP_READ, PVDMA_MAP_WRITE, READ_WRITE, READ_WRITE,
				     READ_WRITE | PVDMA_MAP_ALIGN, PVDMA_MAP_READ | PVDMA_MAP_ALIGN };

	return PICK(cpu, flags);
}

/* Classes of a map that is right. Below 4 GiB there may be no room. */
static u32 right_map(u64 iova_max)
{
	return OK | (run.limits || iova_max < 0xffffffff ? LIMIT : 0);
}

/* Without an attacking device, what is right with one is a mistake. */
static bool call_right(struct cpu *cpu, u32 allowed)
{
	return call(cpu, run.attacker ? allowed : INVALID);
}

/* A live mapping, or a free place in the table; OWN_MAPPINGS if there is none. */
static u32 own_index(struct cpu *cpu, bool live)
{
	u32 start = (u32)below(cpu, OWN_MAPPINGS), i;

	for (i = 0; i < OWN_MAPPINGS; i++) {
		u32 at = (start + i) % OWN_MAPPINGS;

		if (!cpu->own[at] == !live)
			return at;
	}
	return OWN_MAPPINGS;
}

static void own_set(struct cpu *cpu, u32 index, mapping m)
{
	__atomic_store_n(&cpu->own[index], m, __ATOMIC_SEQ_CST);
}

/* Some bytes of a page at the start, some at the end, and all pages between. */
static void cut(struct cpu *cpu, u64 pages, u64 *address, u64 *bytes)
{
	u64 offset = one_in(cpu, 2) ? 0 : below(cpu, PAGE);
	u64 last = one_in(cpu, 2) ? PAGE - 1 : below(cpu, PAGE);

	if (pages == 1 && last < offset)
		last = offset;
	*address += offset;
	*bytes = (pages - 1) * PAGE + last + 1 - offset;
}

static void map_own(struct cpu *cpu)
{
	u64 pages = own_size(cpu, one_in(cpu, 64) ? 512 : 64), gpa = ram_place(cpu, pages), bytes;
	u64 iova_max = any_limit(cpu);
	u32 index = own_index(cpu, false);

	if (index == OWN_MAPPINGS)
		return;
	cut(cpu, pages, &gpa, &bytes);
	set_map(cpu, PVDMA_CALL_MAP, run.attacker, gpa, bytes, iova_max, any_access(cpu));
	if (call_right(cpu, right_map(iova_max)))
		own_set(cpu, index, MAPPING(check_iova(cpu, gpa & (PAGE - 1), pages), pages));
}

static void map_list_own(struct cpu *cpu)
{
	u64 pages = own_size(cpu, 64), done = 0, iova_max = any_limit(cpu);
	u32 index = own_index(cpu, false), count = 0;

	if (index == OWN_MAPPINGS)
		return;
	while (done < pages) {
		u64 some = 1 + below(cpu, 4), gpa, bytes;

		if (some > pages - done)
			some = pages - done;
		gpa = ram_place(cpu, some);
		cut(cpu, some, &gpa, &bytes);
		set_entry(cpu, count++, gpa, bytes);
		done += some;
	}
	set_map(cpu, PVDMA_CALL_MAP_LIST, run.attacker, (u64)call_page(cpu), count, iova_max, any_access(cpu));
	if (!call_right(cpu, right_map(iova_max)))
		return;
	if (cpu->now.rsi != count)
		wrong(cpu, "entries done");
	own_set(cpu, index, MAPPING(check_iova(cpu, 0, pages), pages));
}

/* Everything but what would unmap it: the mapping is none the worse for it. */
static void attack_own(struct cpu *cpu, mapping m)
{
	static const u64 more[] = { 1ull << 32, 1ull << 44, 1ull << 53, 1ull << 63, -PAGE };
	u64 iova = MAPPING_IOVA(m), bytes = MAPPING_PAGES(m) * PAGE;

	switch (below(cpu, 6)) {
	case 0:
		bytes += one_in(cpu, 2) ? PAGE : -PAGE;
		break;
	case 1:
		iova += PAGE;
		bytes -= PAGE;
		break;
	case 2:
		bytes = one_in(cpu, 2) ? 0 : PAGE << below(cpu, 4);
		break;
	case 3:
		bytes += PICK(cpu, more) & ~(PAGE - 1);
		break;
	case 4:
		iova += PICK(cpu, more);
		if (iova < 1ull << 44)
			bytes = PAGE;
		break;
	default:
		iova += bytes - PAGE;
		bytes = PAGE;
	}
	/* a page elsewhere may be a mapping of somebody's */
	set_call(cpu, PVDMA_CALL_UNMAP, run.attacker, iova, bytes);
	if (call_right(cpu, overlaps(m, iova, iova + 1) || !power_of_two(bytes / PAGE) ? INVALID : OK | INVALID))
		check_unmapped(cpu, pvdma_pages(iova, bytes));
}

static void unmap_own(struct cpu *cpu)
{
	u32 index = own_index(cpu, true);
	u64 iova, bytes;
	mapping m;

	if (index == OWN_MAPPINGS)
		return;
	m = cpu->own[index];
	while (one_in(cpu, 3))
		attack_own(cpu, m);
	own_set(cpu, index, 0);
	iova = MAPPING_IOVA(m);
	cut(cpu, MAPPING_PAGES(m), &iova, &bytes);
	set_call(cpu, PVDMA_CALL_UNMAP, run.attacker, iova, bytes);
	if (call_right(cpu, OK))
		check_unmapped(cpu, MAPPING_PAGES(m));
	if (one_in(cpu, 4)) {
		/* twice */
		set_call(cpu, PVDMA_CALL_UNMAP, run.attacker, iova, bytes);
		call(cpu, INVALID);
	}
}

/* Own mappings in a list, and among them one entry that is none. */
static void unmap_list_own(struct cpu *cpu)
{
	mapping given[8];
	u32 index[8], count = 0, bad = (u32)below(cpu, 10), done, i;
	u64 pages = 0;

	for (i = 0; i < COUNT(given); i++) {
		if (i == bad) {
			mapping m = i && one_in(cpu, 2) ? given[i - 1] : innocent_any(cpu);

			/* what was unmapped a moment ago, the innocent's, no bytes, beyond all bus addresses */
			switch (below(cpu, 3)) {
			case 0:
				set_entry(cpu, i, MAPPING_IOVA(m), 0);
				break;
			case 1:
				set_entry(cpu, i, MAPPING_IOVA(m) | 1ull << 44, PAGE);
				break;
			default:
				set_entry(cpu, i, MAPPING_IOVA(m), (MAPPING_PAGES(m) ?: 5) * PAGE);
			}
			count++;
			continue;
		}
		index[i] = own_index(cpu, true);
		if (index[i] == OWN_MAPPINGS)
			break;
		given[i] = cpu->own[index[i]];
		own_set(cpu, index[i], 0);
		set_entry(cpu, i, MAPPING_IOVA(given[i]), MAPPING_PAGES(given[i]) * PAGE);
		count++;
	}
	if (!count)
		return;
	set_call(cpu, PVDMA_CALL_UNMAP_LIST, run.attacker, (u64)call_page(cpu), count);
	call_right(cpu, bad < count ? INVALID : OK);
	done = bad < count && run.attacker ? bad : run.attacker ? count : 0;
	if (cpu->now.rsi != done)
		wrong(cpu, "entries done");
	for (i = 0; i < count; i++) {
		if (i < done)
			pages += MAPPING_PAGES(given[i]);
		else if (i != bad)
			own_set(cpu, index[i], given[i]);
	}
	if (done == count && cpu->now.rdi != pages * PAGE)
		wrong(cpu, "bytes unmapped");
	pages_done(cpu, pages);
}

/* --- mappings that are anybody's ------------------------------------------ */

#define PUBLIC_MAPPINGS	64
#define PUBLIC_PAGES	16u

/* Made lately; each may have been unmapped since. */
static mapping public[2][PUBLIC_MAPPINGS];

static u32 public_handle(u32 which)
{
	return which ? run.second : run.attacker;
}

static void unmap_public(struct cpu *cpu, u32 which, mapping m)
{
	u64 iova = MAPPING_IOVA(m), bytes;

	cut(cpu, MAPPING_PAGES(m), &iova, &bytes);
	set_call(cpu, PVDMA_CALL_UNMAP, public_handle(which), iova, bytes);
	if (call(cpu, OK | INVALID))
		check_unmapped(cpu, MAPPING_PAGES(m));
}

static mapping *public_place(struct cpu *cpu, u32 which)
{
	return &public[which][below(cpu, PUBLIC_MAPPINGS)];
}

/* Everybody may know of it from now on; the one whose place it takes is unmapped. */
static void publish(struct cpu *cpu, u32 which, u64 iova, u64 pages)
{
	mapping old = __atomic_exchange_n(public_place(cpu, which), MAPPING(iova, pages), __ATOMIC_SEQ_CST);

	if (old)
		unmap_public(cpu, which, old);
}

static u32 any_attacker(struct cpu *cpu)
{
	return run.second && one_in(cpu, 3) ? 1 : 0;
}

static void map_public(struct cpu *cpu)
{
	u32 which = any_attacker(cpu);
	u64 pages = 1ull << below(cpu, 5), gpa = ram_place(cpu, pages), bytes, iova_max = any_limit(cpu);

	cut(cpu, pages, &gpa, &bytes);
	set_map(cpu, PVDMA_CALL_MAP, public_handle(which), gpa, bytes, iova_max, any_access(cpu));
	if (call_right(cpu, right_map(iova_max)))
		publish(cpu, which, check_iova(cpu, gpa & (PAGE - 1), pages), pages);
}

/* Unmaps one, once or twice; it stays in the table, for others to try. */
static void unmap_any_public(struct cpu *cpu)
{
	u32 which = any_attacker(cpu);
	mapping m = __atomic_load_n(public_place(cpu, which), __ATOMIC_RELAXED);

	if (!m)
		return;
	unmap_public(cpu, which, m);
	if (one_in(cpu, 2))
		unmap_public(cpu, which, m);
}

/* --- call pages that others write while they are read --------------------- */

static struct pvdma_entry shared_maps[8] __attribute__((aligned(4096)));
static struct pvdma_entry shared_unmaps[8] __attribute__((aligned(4096)));

/*
 * Whatever half of one entry the host sees with whatever half of another: it is
 * one page, or nothing.
 */
static void scribble(struct cpu *cpu)
{
	static const u64 no_bytes[] = { 0, 1ull << 32, 1ull << 63, ~0xffffffffull };
	u32 i, j;

	for (i = 0; i < 4; i++) {
		bool bad = one_in(cpu, 16);
		volatile struct pvdma_entry *map = &shared_maps[below(cpu, COUNT(shared_maps))];
		volatile struct pvdma_entry *unmap = &shared_unmaps[below(cpu, COUNT(shared_unmaps))];
		mapping m = __atomic_load_n(public_place(cpu, 0), __ATOMIC_RELAXED);

		map->address = bad ? PAGE * random(cpu) : ARENA_SHARED + PAGE * below(cpu, ARENA_BYTES / PAGE);
		map->bytes = bad ? PICK(cpu, no_bytes) : PAGE;
		unmap->address = MAPPING_IOVA(m);
		unmap->bytes = bad ? PICK(cpu, no_bytes) : PAGE;
		for (j = 0; bad && j < 100; j++) {
			map->bytes = j & 1 ? PAGE : no_bytes[j / 2 % COUNT(no_bytes)];
			map->address ^= 1ull << (12 + j % 52);
		}
		if (bad) {
			map->address = ARENA_SHARED;
			map->bytes = PAGE;
		}
	}
}

static void call_shared(struct cpu *cpu)
{
	u32 count = 1u << below(cpu, 4);
	bool ok;

	scribble(cpu);
	if (one_in(cpu, 2)) {
		set_map(cpu, PVDMA_CALL_MAP_LIST, run.attacker, (u64)shared_maps, count, ANY_IOVA, READ_WRITE);
		ok = call(cpu, OK | INVALID | (run.limits ? LIMIT : 0));
	} else {
		set_call(cpu, PVDMA_CALL_UNMAP_LIST, run.attacker, (u64)shared_unmaps, count);
		ok = call(cpu, OK | INVALID);
	}
	if (ok ? cpu->now.rsi != count : cpu->now.rsi >= count)
		wrong(cpu, "entries done");
	if ((u32)cpu->asked.rax == PVDMA_CALL_UNMAP_LIST) {
		pages_done(cpu, cpu->now.rsi);
		if (ok && cpu->now.rdi != count * PAGE)
			wrong(cpu, "bytes unmapped");
	} else if (ok) {
		publish(cpu, 0, check_iova(cpu, 0, count), count);
	}
}

/* --- wild calls ----------------------------------------------------------- */

static u64 any_handle(struct cpu *cpu)
{
	const u64 handles[] = {
		0, run.devices + 1, PVDMA_DEVICES_MAX + 1, (1ull << 31) + run.attacker, 1ull << 32,
		(1ull << 32) + run.attacker, (1ull << 53) + run.attacker, (1ull << 63) + run.attacker, ~0ull,
		random(cpu),
	};

	if (run.devices && !one_in(cpu, 4))
		return public_handle(any_attacker(cpu));
	return PICK(cpu, handles);
}

static u64 any_gpa(struct cpu *cpu)
{
	const u64 low = guest_ram.low_end, high = guest_ram.high_end;
	const u64 edges[] = {
		0, 1, PAGE, low - 1, low - PAGE, low, low + 1, 0xc0000000, 0xd0000000, 0xe0000000,
		0xfec00000, LAPIC, HIGH - PAGE, HIGH - 1, HIGH, high - 1, high - PAGE, high, 1ull << 44,
		(1ull << 44) + ARENA, (1ull << 53) - 1, (1ull << 53) + ARENA, 1ull << 63, ~0ull,
		0ull - PAGE, random(cpu), random(cpu) >> below(cpu, 64),
	};

	if (one_in(cpu, 3))
		return ram_place(cpu, 16) + (one_in(cpu, 2) ? below(cpu, PAGE) : 0);
	return PICK(cpu, edges) + (one_in(cpu, 4) ? PAGE * below(cpu, 8) : 0);
}

static u64 any_bytes(struct cpu *cpu, u64 address)
{
	const u64 edges[] = {
		0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 16 * PAGE, GIB - PAGE, GIB - 1, GIB, GIB + 1,
		1ull << 32, (1ull << 32) + PAGE, 1ull << 53, (1ull << 53) + 1, 1ull << 63,
		(1ull << 63) + PAGE, ~0ull, 0 - address, PAGE - address, 0 - address - 1,
		random(cpu), random(cpu) >> below(cpu, 64),
	};

	return one_in(cpu, 3) ? PAGE << below(cpu, 5) : PICK(cpu, edges);
}

static u64 any_flags(struct cpu *cpu)
{
	const u64 edges[] = {
		0, PVDMA_MAP_ALIGN, 8, READ_WRITE | 8, READ_WRITE | 1ull << 31, READ_WRITE | 1ull << 32,
		READ_WRITE | 16, READ_WRITE | 1ull << 53, READ_WRITE | 1ull << 63, ~0ull, random(cpu),
	};

	return one_in(cpu, 4) ? PICK(cpu, edges) : any_access(cpu);
}

/* A limit below which there is no bus address at all. */
static u64 no_room(struct cpu *cpu)
{
	static const u64 iova_max[] = { 0, 1, PAGE - 2, PAGE - 1, 0xffffe, 0xfffff };

	return PICK(cpu, iova_max);
}

/* One map or map_list that is right in all but the limit, or all in all. */
static void call_map_right(struct cpu *cpu, u64 pages, u64 offset)
{
	u64 room = cpu->now.r9;

	/* what would be a large mapping, or one whose size is taken, must not come to be */
	if (pages > PUBLIC_PAGES || !power_of_two(pages))
		room = no_room(cpu);
	cpu->now.r9 = room;
	if (call(cpu, room < 0x100000 ? LIMIT : right_map(room)))
		publish(cpu, cpu->asked.rdi == run.second, check_iova(cpu, offset, pages), pages);
}

static void map_wild(struct cpu *cpu)
{
	u64 handle = any_handle(cpu), gpa = any_gpa(cpu), bytes = any_bytes(cpu, gpa), flags = any_flags(cpu);

	set_map(cpu, PVDMA_CALL_MAP, handle, gpa, bytes, one_in(cpu, 4) ? no_room(cpu) : any_limit(cpu), flags);
	if (right_handle(handle) && right_flags(flags) && right_length(gpa, bytes) && in_ram(gpa, bytes)) {
		call_map_right(cpu, pvdma_pages(gpa, bytes), gpa & (PAGE - 1));
		return;
	}
	if (run.innocent && one_in(cpu, 4))
		cpu->now.rdi = run.innocent;
	if (cpu->now.rdi == run.innocent && right_flags(flags) && right_length(gpa, bytes) && in_ram(gpa, bytes))
		cpu->now.rdi = 0;
	call(cpu, INVALID);
}

/* An address that something is mapped at, or nearly. */
static u64 any_iova(struct cpu *cpu)
{
	const u64 edges[] = { 0, PAGE, 1ull << 20, 0xfee00000, 1ull << 44, 1ull << 53, ~0ull, 0 - PAGE, random(cpu) };
	const struct cpu *victim = &cpu_data[below(cpu, run.cpus)];
	u64 iova;

	switch (below(cpu, 4)) {
	case 0:
		iova = MAPPING_IOVA(__atomic_load_n(&PICK(cpu, victim->own), __ATOMIC_RELAXED));
		break;
	case 1:
		iova = MAPPING_IOVA(__atomic_load_n(public_place(cpu, any_attacker(cpu)), __ATOMIC_RELAXED));
		break;
	case 2:
		iova = MAPPING_IOVA(innocent_any(cpu));
		break;
	default:
		iova = PICK(cpu, edges);
	}
	if (one_in(cpu, 3))
		iova += PAGE * (below(cpu, 64) - 32);
	return iova + (one_in(cpu, 4) ? below(cpu, PAGE) : 0);
}

/* What to unmap: never a size that is some CPU's own. Returns whether it may succeed. */
static bool any_unmap(struct cpu *cpu, u64 *iova, u64 *bytes)
{
	u64 pages;

	*iova = any_iova(cpu);
	*bytes = one_in(cpu, 8) ? PAGE * MAPPING_PAGES(innocent_any(cpu)) : any_bytes(cpu, *iova);
	if (!right_length(*iova, *bytes) || *iova >= 1ull << 44)
		return false;
	pages = pvdma_pages(*iova, *bytes);
	if (pages % 3 == 0) {
		*iova &= ~(PAGE - 1);
		*bytes = PAGE;
		return true;
	}
	return power_of_two(pages) && pages <= PUBLIC_PAGES;
}

static void unmap_wild(struct cpu *cpu)
{
	u64 handle = any_handle(cpu), iova, bytes;
	bool possible = any_unmap(cpu, &iova, &bytes) && right_handle(handle);

	set_call(cpu, PVDMA_CALL_UNMAP, handle, iova, bytes);
	if (call(cpu, possible ? OK | INVALID : INVALID))
		check_unmapped(cpu, pvdma_pages(iova, bytes));
}

/* The innocent device's mappings, word for word, but by the attackers' handles. */
static void attack_innocent(struct cpu *cpu)
{
	mapping m = innocent_any(cpu);
	u64 iova = MAPPING_IOVA(m), bytes;

	if (!m)
		return;
	cut(cpu, MAPPING_PAGES(m), &iova, &bytes);
	set_call(cpu, PVDMA_CALL_UNMAP, public_handle(any_attacker(cpu)), iova, bytes);
	call(cpu, INVALID);
}

/* A page or a number of entries that no list call takes. */
static void bad_list(struct cpu *cpu, u64 *page, u64 *count)
{
	const u64 pages[] = {
		*page + 8, *page + 1, guest_ram.low_end, 0xe0000000, LAPIC, 0xd0000000, HIGH - PAGE,
		guest_ram.high_end ? guest_ram.high_end : HIGH, (1ull << 53) + *page,
		(1ull << 63) + *page, 0 - PAGE, ~0ull, random(cpu) | 1ull << 48,
	};
	const u64 counts[] = {
		0, PVDMA_LIST_ENTRIES + 1, 1ull << 31, 1ull << 32, (1ull << 32) + 5, (1ull << 53) + 1,
		1ull << 63, ~0ull, random(cpu) | 1ull << 40,
	};

	if (one_in(cpu, 2))
		*page = PICK(cpu, pages);
	else
		*count = PICK(cpu, counts);
}

static void map_list_wild(struct cpu *cpu)
{
	u64 handle = any_handle(cpu), page = (u64)call_page(cpu), flags = any_flags(cpu), pages = 0;
	u64 count = one_in(cpu, 16) ? PVDMA_LIST_ENTRIES : 1 + below(cpu, 16);
	u32 odd = (u32)below(cpu, 2 * count), wrong_at = (u32)count, i;
	bool right = right_handle(handle) && right_flags(flags);

	for (i = 0; i < count; i++) {
		u64 gpa = i == odd ? any_gpa(cpu) : ARENA_SHARED + PAGE * below(cpu, ARENA_BYTES / PAGE);
		u64 bytes = i == odd ? any_bytes(cpu, gpa) : PAGE;

		set_entry(cpu, i, gpa, bytes);
		if (wrong_at < count)
			continue;
		if (right_length(gpa, bytes) && in_ram(gpa, bytes) &&
		    pages + pvdma_pages(gpa, bytes) <= PVDMA_MAP_PAGES_MAX)
			pages += pvdma_pages(gpa, bytes);
		else
			wrong_at = i;
	}
	if (one_in(cpu, 4)) {
		bad_list(cpu, &page, &count);
		right = false;
	}
	set_map(cpu, PVDMA_CALL_MAP_LIST, handle, page, count, any_limit(cpu), flags);
	if (right && wrong_at == count) {
		call_map_right(cpu, pages, 0);
	} else {
		call(cpu, INVALID);
		if (cpu->now.rsi != (right ? wrong_at : 0))
			wrong(cpu, "entries done");
	}
}

static void unmap_list_wild(struct cpu *cpu)
{
	u64 handle = any_handle(cpu), page = (u64)call_page(cpu), count = 1 + below(cpu, 8), pages = 0;
	u64 possible = count;
	u32 i;

	for (i = 0; i < count; i++) {
		u64 iova, bytes;

		if (!any_unmap(cpu, &iova, &bytes) && possible == count)
			possible = i;
		set_entry(cpu, i, iova, bytes);
	}
	if (!right_handle(handle))
		possible = 0;
	if (one_in(cpu, 4)) {
		bad_list(cpu, &page, &count);
		possible = 0;
	}
	set_call(cpu, PVDMA_CALL_UNMAP_LIST, handle, page, count);
	if (call(cpu, possible == count ? OK | INVALID : INVALID) ? cpu->now.rsi != count :
	    cpu->now.rsi > possible || (possible && cpu->now.rsi == count))
		wrong(cpu, "entries done");
	for (i = 0; i < cpu->now.rsi && i < PVDMA_LIST_ENTRIES; i++)
		pages += pvdma_pages(call_page(cpu)[i].address, call_page(cpu)[i].bytes);
	pages_done(cpu, pages);
}

static void release(struct cpu *cpu)
{
	u64 handle = any_handle(cpu);

	if (handle == run.attacker)
		handle = run.second;
	set_call(cpu, PVDMA_CALL_RELEASE, handle, random(cpu), random(cpu));
	if (!call(cpu, handle && handle == run.second ? OK : INVALID))
		return;
	if (cpu->now.rsi % PAGE || cpu->now.rsi / PAGE < cpu->now.rdi)
		wrong(cpu, "bytes released");
	pages_done(cpu, cpu->now.rsi / PAGE);
}

/* Devices here are strict: they have none, and nothing that could begin anew. */
static void table(struct cpu *cpu)
{
	const u64 anews[] = { 0, 1, 2, 1ull << 32 | 1, 1ull << 53, ~0ull };
	u64 handle = any_handle(cpu), anew = PICK(cpu, anews);

	set_call(cpu, PVDMA_CALL_TABLE, handle, anew, random(cpu));
	if (call(cpu, handle >= 1 && handle <= run.devices && anew <= 1 ? OK : INVALID) &&
	    (cpu->now.rdi || cpu->now.rsi))
		wrong(cpu, "table");
}

static void probe(struct cpu *cpu)
{
	u64 page = (u64)call_page(cpu), count = 1;
	bool right = !one_in(cpu, 3);
	u32 i;

	if (right && one_in(cpu, 2))
		page = 0;
	while (!right && count == 1 && page == (u64)call_page(cpu))
		bad_list(cpu, &page, &count);
	/* the number of entries is nothing to probe */
	right |= page == (u64)call_page(cpu);
	set_call(cpu, PVDMA_CALL_PROBE, random(cpu), page, count);
	if (!call(cpu, right ? OK : INVALID))
		return;
	if (cpu->now.rdi != run.host.version || cpu->now.rsi != run.host.features ||
	    cpu->now.r10 != (page ? run.ranges : 0))
		wrong(cpu, "offer");
	for (i = 0; page && i < run.ranges; i++)
		if (call_page(cpu)[i].address != run_ranges[i].first || call_page(cpu)[i].bytes != run_ranges[i].last)
			wrong(cpu, "range");
}

static void is_assigned(struct cpu *cpu)
{
	const u64 rids[] = { below(cpu, 32) << 3, below(cpu, 256), random(cpu), 1ull << 16,
			     1ull << 32 | below(cpu, 32) << 3, 1ull << 53 | 8, ~0ull };
	u64 rid = PICK(cpu, rids);

	set_call(cpu, PVDMA_CALL_IS_ASSIGNED, rid, random(cpu), random(cpu));
	if (call(cpu, OK) && cpu->now.rdi != (rid < 256 && rid % 8 == 0 ? run.handle_of_slot[rid / 8] : 0))
		wrong(cpu, "handle");
}

static void unknown(struct cpu *cpu)
{
	const u64 numbers[] = { 0, CALLS, 99, 1 << 8 | PVDMA_CALL_UNMAP, 1 << 16 | PVDMA_CALL_MAP,
				1ull << 31 | PVDMA_CALL_UNMAP, 0xffffffff, random(cpu) | 1 << 20 };
	mapping m = PICK(cpu, cpu->own);

	set_call(cpu, (u32)PICK(cpu, numbers), run.attacker, MAPPING_IOVA(m), MAPPING_PAGES(m) * PAGE);
	call(cpu, INVALID);
}

/* Anything at all. */
static void noise(struct cpu *cpu)
{
	set_call(cpu, (u32)(one_in(cpu, 2) ? below(cpu, CALLS) : random(cpu)), random(cpu), random(cpu), random(cpu));
	/* but for a device that by chance is there, and for a call without a page */
	cpu->now.rdi |= 1ull << 40;
	cpu->now.rsi |= 1ull << 40;
	call(cpu, (u32)cpu->now.rax == PVDMA_CALL_IS_ASSIGNED ? OK : INVALID);
}

/* --- the storm ------------------------------------------------------------ */

static void storm_on(u32 number)
{
	static const struct {
		u32 weight;
		void (*run)(struct cpu *cpu);
	} mix[] = {
		{ 12, map_own }, { 6, map_list_own }, { 14, unmap_own }, { 3, unmap_list_own },
		{ 8, map_public }, { 8, unmap_any_public }, { 4, call_shared },
		{ 10, map_wild }, { 10, unmap_wild }, { 6, map_list_wild }, { 4, unmap_list_wild },
		{ 6, attack_innocent }, { 1, release }, { 1, table }, { 2, probe }, { 2, is_assigned }, { 2, unknown },
		{ 4, noise },
	};
	struct cpu *cpu = &cpu_data[number];
	u64 begin = cpu->made;
	u32 all = 0, i;

	for (i = 0; i < COUNT(mix); i++)
		all += mix[i].weight;
	while (cpu->made - begin < run.calls) {
		u32 at = (u32)below(cpu, all);

		for (i = 0; at >= mix[i].weight; i++)
			at -= mix[i].weight;
		mix[i].run(cpu);
		if (number == 0 && run.innocent)
			innocent_go_on(cpu);
	}
}

/* Unmaps whatever is left, so that what was mapped and what was unmapped must be the same. */
static void clean_up(struct cpu *cpu)
{
	u32 i, j;

	for (i = 0; i < run.cpus; i++) {
		for (j = 0; j < OWN_MAPPINGS; j++) {
			mapping m = cpu_data[i].own[j];

			if (!m)
				continue;
			own_set(&cpu_data[i], j, 0);
			set_call(cpu, PVDMA_CALL_UNMAP, run.attacker, MAPPING_IOVA(m), MAPPING_PAGES(m) * PAGE);
			if (call(cpu, OK))
				check_unmapped(cpu, MAPPING_PAGES(m));
		}
	}
	for (i = 0; i < 2; i++)
		for (j = 0; j < PUBLIC_MAPPINGS; j++)
			if (public[i][j])
				unmap_public(cpu, i, public[i][j]);
}

/* The devices of the bus, by calls that count like all others. */
static void find_devices(struct cpu *cpu)
{
	u32 slot, handle;

	for (slot = 0; slot < 32; slot++) {
		bool is_edu = pci_read(slot, 0, 0) == EDU_ID;

		set_call(cpu, PVDMA_CALL_IS_ASSIGNED, slot << 3, 0, 0);
		if (!call(cpu, OK) || !cpu->now.rdi)
			continue;
		handle = (u32)cpu->now.rdi;
		run.handle_of_slot[slot] = handle;
		run.devices++;
		if (is_edu) {
			run.innocent = handle;
			run.innocent_slot = slot;
		} else if (!run.attacker) {
			run.attacker = handle;
		} else {
			run.second = handle;
		}
	}
}

void guest_main(void)
{
	struct cpu *cpu = &cpu_data[0];
	u32 i;

	if (pvdma_discover(&run.host) != PVDMA_FOUND) {
		print("guest: no pvdma host\n");
		return;
	}
	run.cpus = cpu_count();
	run.seed = option_number("seed", 1);
	run.calls = option_number("calls", 10000) / run.cpus;
	run.limits = has_option("limits");
	run.shared_domain = !has_option("own-domain");
	for (i = 0; i < run.cpus; i++) {
		cpu_data[i].number = i;
		cpu_data[i].random = (run.seed * CPUS_MAX + i + 1) * 0x9e3779b97f4a7c15ull;
	}
	find_devices(cpu);
	set_call(cpu, PVDMA_CALL_PROBE, PVDMA_ABI_VERSION, (u64)run_ranges, 0);
	if (call(cpu, OK))
		run.ranges = (u32)cpu->now.r10;
	print("guest: seed=%lu cpus=%u devices=%u attackers=%u,%u innocent=%u\n", (unsigned long)run.seed,
	      run.cpus, run.devices, run.attacker, run.second, run.innocent);
	if (run.attacker && guest_ram.low_end < ARENA_END) {
		print("guest: needs %lu bytes of RAM\n", (unsigned long)ARENA_END);
		return;
	}
	if (run.innocent)
		innocent_begin(cpu);
	run_on_cpus(storm_on);
	if (run.innocent)
		innocent_end(cpu);
	clean_up(cpu);
	report();
	serial_read();
}
