// SPDX-License-Identifier: MIT
/*
 * A guest that makes every mistake the contract knows, with good calls before,
 * between and after: mappings made at the start ("innocent") are unmapped at the
 * end, so whatever changed something shows. Prints a line per call,
 *
 *   case NAME CALL CLASS ERRNO OUT=HEX... pages=N VERDICT
 *
 * with the OUT registers that are valid, the pages that the call mapped or
 * unmapped, and what became of the rest: "kept", or what changed although the
 * contract says that it does not. What is right is the test's to say
 * (calls.test.ts). With `pause' on the command line it waits for a byte on COM1
 * while the innocent mappings are the only ones, and again when there is none.
 *
 * Without an assigned device all handles are bad, 0 among them.
 */
#include "lib.h"

#define PAGE		PVDMA_PAGE_BYTES
#define ANY_IOVA	(~0ull)
#define READ_WRITE	(PVDMA_MAP_READ | PVDMA_MAP_WRITE)
/* The host knows no such call. */
#define NO_CALL		99u

/* RAM that nobody reads or writes: mapping it is enough. */
#define ARENA		0x1000000ull
#define SCRATCH		(ARENA + 0x80000)

static struct pvdma_entry call_page[PVDMA_LIST_ENTRIES] __attribute__((aligned(4096)));
static struct pvdma_entry call_page_before[PVDMA_LIST_ENTRIES];

static struct pvdma_host host;
static struct pvdma_counters counters;
static u32 devices;
static u32 first_handle, second_handle, first_rid;

/* Which registers a call sets: bits in the order of out_names. */
#define OUT_RDI	1
#define OUT_RSI	2
#define OUT_R8	4
#define OUT_R9	8
#define OUT_R10	16

static const char * const out_names[] = { "rdi", "rsi", "r8", "r9", "r10" };

static const struct contract {
	const char *name;
	u32 out;	/* valid with ok */
	u32 always;	/* valid with every status */
} contract[] = {
	{ "unknown", 0, 0 },
	[PVDMA_CALL_PROBE] = { "probe", OUT_RDI | OUT_RSI | OUT_R8 | OUT_R9 | OUT_R10, 0 },
	[PVDMA_CALL_IS_ASSIGNED] = { "is_assigned", OUT_RDI | OUT_RSI | OUT_R8 | OUT_R9 | OUT_R10, 0 },
	[PVDMA_CALL_MAP] = { "map", OUT_RDI, 0 },
	[PVDMA_CALL_UNMAP] = { "unmap", OUT_RDI, 0 },
	[PVDMA_CALL_MAP_LIST] = { "map_list", OUT_RDI | OUT_RSI, OUT_RSI },
	[PVDMA_CALL_UNMAP_LIST] = { "unmap_list", OUT_RDI | OUT_RSI, OUT_RSI },
	[PVDMA_CALL_RELEASE] = { "release", OUT_RDI | OUT_RSI, 0 },
	[PVDMA_CALL_TABLE] = { "table", OUT_RDI | OUT_RSI, 0 },
};

static const struct contract *contract_of(u64 call)
{
	return &contract[(u32)call <= PVDMA_CALL_TABLE ? (u32)call : 0];
}

/* --- registers ------------------------------------------------------------ */

static const char * const register_names[REGISTERS] = {
	"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp",
	"r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
};

/* The registers of the call under way, and as they have to be afterwards. */
static struct registers now, expected;

/* Odd and above 2^53 everywhere: a host that counts in doubles would round it. */
static void fill_registers(u16 port)
{
	u64 *words = (u64 *)&now;
	u32 i;

	for (i = 0; i < REGISTERS; i++)
		words[i] = 0xfedcba9876543211ull + 0x10000000002ull * i;
	now.rdx = (now.rdx & ~0xffffull) | port;
}

static u64 *out_register(struct registers *registers, u32 bit)
{
	switch (bit) {
	case OUT_RDI: return &registers->rdi;
	case OUT_RSI: return &registers->rsi;
	case OUT_R8: return &registers->r8;
	case OUT_R9: return &registers->r9;
	default: return &registers->r10;
	}
}

static void print_out(u32 valid)
{
	u32 i;

	for (i = 0; i < 5; i++)
		if (valid & 1u << i)
			print(" %s=0x%lx", out_names[i], (unsigned long)*out_register(&now, 1u << i));
}

/* Ends a line: registers and call page are as expected, or what is not. */
static void print_verdict(bool page_written)
{
	const u64 *is = (const u64 *)&now, *should = (const u64 *)&expected;
	const u64 *page = (const u64 *)call_page, *before = (const u64 *)call_page_before;
	bool kept = true;
	u32 i;

	for (i = 0; i < REGISTERS; i++) {
		if (is[i] == should[i])
			continue;
		print(" CHANGED:%s=0x%lx", register_names[i], (unsigned long)is[i]);
		kept = false;
	}
	for (i = 0; i < sizeof(call_page) / 8 && page[i] == before[i]; i++)
		;
	if (i < sizeof(call_page) / 8 && !page_written) {
		print(" CHANGED:call-page");
		kept = false;
	}
	print(kept ? " kept\n" : "\n");
}

/* --- calls ---------------------------------------------------------------- */

/* Pages that the first `count' entries of the call page touch. */
static u64 list_pages(u64 count)
{
	u64 pages = 0;
	u32 i;

	for (i = 0; i < count && i < PVDMA_LIST_ENTRIES; i++)
		pages += pvdma_pages(call_page[i].address, call_page[i].bytes);
	return pages;
}

/* What the call at hand mapped or unmapped, going by its status. */
static u64 pages_done(u32 call, const struct registers *asked, bool ok)
{
	switch (call) {
	case PVDMA_CALL_MAP:
	case PVDMA_CALL_UNMAP:
		return ok ? pvdma_pages(asked->rsi, asked->r8) : 0;
	case PVDMA_CALL_MAP_LIST:
		return ok ? list_pages(asked->r8) : 0;
	case PVDMA_CALL_UNMAP_LIST:
		return list_pages(now.rsi);
	case PVDMA_CALL_RELEASE:
		return ok ? now.rsi / PAGE : 0;
	default:
		return 0;
	}
}

static void print_case(const char *group, const char *variant, const char *call)
{
	print("case %s:%s %s", group, variant, call);
}

static void print_status(u32 status)
{
	print(" %s %u", pvdma_status_name(status), PVDMA_STATUS_ERRNO(status));
}

static void copy_call_page(void)
{
	u32 i;

	for (i = 0; i < PVDMA_LIST_ENTRIES; i++)
		call_page_before[i] = call_page[i];
}

typedef void instruction(struct registers *registers);

static void at_cpl3(void *registers)
{
	registers_out32(registers);
}

static void user_out32(struct registers *registers)
{
	user_run(at_cpl3, registers);
}

static void at_cpl3_out16(void *registers)
{
	registers_out16(registers);
}

static void user_out16(struct registers *registers)
{
	user_run(at_cpl3_out16, registers);
}

/* Makes the call that is in the registers `now', and prints the line. */
static u32 make_call(instruction *execute, const char *group, const char *variant)
{
	struct registers asked = now;
	const struct contract *rule = contract_of(asked.rax);
	bool writes_page = false;
	u32 status, valid, i;
	u64 pages;
	bool ok;

	copy_call_page();
	execute(&now);
	status = (u32)now.rax;
	ok = PVDMA_STATUS_CLASS(status) == PVDMA_STATUS_OK;
	if ((u32)asked.rax == PVDMA_CALL_PROBE && asked.rsi == (u64)call_page)
		writes_page = ok;
	expected = asked;
	expected.rax = status;
	for (i = 0; i < 5; i++)
		if (rule->out & 1u << i)
			*out_register(&expected, 1u << i) = *out_register(&now, 1u << i);

	print_case(group, variant, rule->name);
	print_status(status);
	valid = ok ? rule->out : rule->always;
	print_out(valid);
	pages = pages_done((u32)asked.rax, &asked, ok);
	if (pages)
		print(" pages=%lu", (unsigned long)pages);
	print_verdict(writes_page);
	return status;
}

static void set_call(u64 number, u64 rdi, u64 rsi)
{
	fill_registers(host.port);
	now.rax = number;
	now.rdi = rdi;
	now.rsi = rsi;
}

static void set_map(u64 handle, u64 gpa, u64 bytes, u64 iova_max, u64 flags)
{
	set_call(PVDMA_CALL_MAP, handle, gpa);
	now.r8 = bytes;
	now.r9 = iova_max;
	now.r10 = flags;
}

static void set_unmap(u64 handle, u64 iova, u64 bytes)
{
	set_call(PVDMA_CALL_UNMAP, handle, iova);
	now.r8 = bytes;
}

static void set_map_list(u64 handle, u64 page, u64 count, u64 iova_max, u64 flags)
{
	set_map(handle, page, count, iova_max, flags);
	now.rax = PVDMA_CALL_MAP_LIST;
}

static void set_unmap_list(u64 handle, u64 page, u64 count)
{
	set_unmap(handle, page, count);
	now.rax = PVDMA_CALL_UNMAP_LIST;
}

static void map(const char *variant, u64 gpa, u64 bytes, u64 iova_max, u64 flags)
{
	set_map(first_handle, gpa, bytes, iova_max, flags);
	make_call(registers_out32, "map", variant);
}

/* A mapping of one page that is there when the host says so; its iova or 0. */
static u64 map_page(const char *variant, u64 gpa)
{
	map(variant, gpa, PAGE, ANY_IOVA, READ_WRITE);
	return PVDMA_STATUS_CLASS((u32)now.rax) == PVDMA_STATUS_OK ? now.rdi : 0;
}

static void unmap(const char *variant, u64 iova, u64 bytes)
{
	set_unmap(first_handle, iova, bytes);
	make_call(registers_out32, "unmap", variant);
}

static void map_list(const char *variant, u64 page, u64 count, u64 iova_max, u64 flags)
{
	set_map_list(first_handle, page, count, iova_max, flags);
	make_call(registers_out32, "map_list", variant);
}

static void unmap_list(const char *variant, u64 page, u64 count)
{
	set_unmap_list(first_handle, page, count);
	make_call(registers_out32, "unmap_list", variant);
}

/* An entry of the call page. */
static void entry(u32 index, u64 address, u64 bytes)
{
	call_page[index].address = address;
	call_page[index].bytes = bytes;
}

/* Five good entries of a page each, and beyond them what must not be looked at. */
static void five_entries(void)
{
	u32 i;

	for (i = 0; i < PVDMA_LIST_ENTRIES; i++)
		entry(i, i < 5 ? SCRATCH + 2 * PAGE * i : ~0ull, i < 5 ? PAGE : ~0ull);
}

/* --- the innocent --------------------------------------------------------- */

/* Mappings that are there from start to end, made through the guest's core. */
struct innocent {
	const char *name;
	u64 gpa;
	u64 bytes;
	u64 iova_max;
	u32 flags;
	u64 iova;
};

static struct innocent innocents[] = {
	{ "page", ARENA + 0x123, 0x400, ANY_IOVA, READ_WRITE, 0 },
	{ "pages", ARENA + 0x10ff0, 0x3020, ANY_IOVA, READ_WRITE, 0 },
	{ "twin", ARENA + 0x123, 0x400, ANY_IOVA, PVDMA_MAP_READ, 0 },
	{ "aligned", ARENA + 0x20000, 3 * PAGE, ANY_IOVA, PVDMA_MAP_WRITE | PVDMA_MAP_ALIGN, 0 },
	{ "narrow", ARENA + 0x30000, PAGE, (1u << 28) - 1, READ_WRITE, 0 },
	{ "last-byte", 0 /* of low RAM */, 1, ANY_IOVA, READ_WRITE, 0 },
	{ "high-first", 1ull << 32, PAGE, ANY_IOVA, READ_WRITE, 0 },
	{ "high-last", 0 /* of high RAM */, PAGE / 2, ANY_IOVA, READ_WRITE, 0 },
};

enum { ONE_PAGE, PAGES, TWIN, ALIGNED, NARROW, LAST_BYTE, HIGH_FIRST, HIGH_LAST, INNOCENTS };

enum { SCATTERED, FULL, CONTIGUOUS, TWICE, LISTS };

static struct innocent_list {
	const char *name;
	u64 pages;
	u64 iova;
} lists[LISTS] = { { "scattered", 0, 0 }, { "full", 0, 0 }, { "contiguous", 0, 0 }, { "twice", 0, 0 } };

static u32 innocent_count(void)
{
	return guest_ram.high_end ? INNOCENTS : HIGH_FIRST;
}

/* The line of a call that the core made; `iova' and `pages' if it went well. */
static void core_line(const char *variant, const char *call, u32 status, const char *out,
		      u64 value, u64 pages)
{
	print_case("innocent", variant, call);
	print_status(status);
	if (PVDMA_STATUS_CLASS(status) == PVDMA_STATUS_OK)
		print("%s0x%lx pages=%lu", out, (unsigned long)value, (unsigned long)pages);
	print(" core\n");
}

static void build_list(u32 which, struct pvdma_list *list)
{
	u32 i;

	pvdma_list_start(list, call_page, host.list_entries, host.map_pages, ~0ull);
	switch (which) {
	case SCATTERED:
		pvdma_list_add(list, ARENA + 0x40800, PAGE);
		pvdma_list_add(list, ARENA + 0x50000, PAGE);
		pvdma_list_add(list, ARENA + 0x60010, 16);
		break;
	case FULL:
		for (i = 0; pvdma_list_add(list, ARENA + 0x100000 + 2 * PAGE * i, PAGE); i++)
			;
		break;
	case CONTIGUOUS:
		for (i = 0; i < 4; i++)
			pvdma_list_add(list, ARENA + 0x70000 + PAGE * i, PAGE);
		break;
	default:
		pvdma_list_add(list, ARENA + 0x78000, PAGE);
		pvdma_list_add(list, ARENA + 0x78000, PAGE);
	}
}

static void map_innocents(void)
{
	struct pvdma_list list;
	u32 status, i;

	innocents[LAST_BYTE].gpa = guest_ram.low_end - 1;
	innocents[HIGH_LAST].gpa = guest_ram.high_end - PAGE / 2;
	for (i = 0; i < innocent_count(); i++) {
		struct innocent *one = &innocents[i];

		status = pvdma_map(&host, &counters, first_handle, one->gpa, one->bytes,
				   one->iova_max, one->flags, &one->iova);
		core_line(one->name, "map", status, " rdi=", one->iova,
			  pvdma_pages(one->gpa, one->bytes));
	}
	for (i = 0; i < LISTS; i++) {
		build_list(i, &list);
		status = pvdma_map_list(&host, &counters, first_handle, &list,
					(u64)call_page, ANY_IOVA, READ_WRITE, &lists[i].iova);
		lists[i].pages = list.pages;
		core_line(lists[i].name, "map_list", status, " rdi=", lists[i].iova, list.pages);
	}
}

static void unmap_innocents(void)
{
	u32 status, failed, i;
	u64 pages = 0;

	/* The first three as a list, the others one by one. */
	for (i = 0; i <= TWIN; i++) {
		entry(i, innocents[i].iova, innocents[i].bytes);
		pages += pvdma_pages(innocents[i].gpa, innocents[i].bytes);
	}
	if (devices) {
		status = pvdma_unmap_list(&host, &counters, first_handle, call_page,
					  (u64)call_page, i, &failed);
		core_line("three", "unmap_list", status, " failed=", failed, pages);
	}
	for (; i < innocent_count(); i++) {
		status = pvdma_unmap(&host, &counters, first_handle, innocents[i].iova,
				     innocents[i].bytes);
		core_line(innocents[i].name, "unmap", status, " iova=", innocents[i].iova,
			  pvdma_pages(innocents[i].gpa, innocents[i].bytes));
	}
	for (i = 0; i < LISTS; i++) {
		status = pvdma_unmap(&host, &counters, first_handle, lists[i].iova,
				     lists[i].pages * PAGE);
		core_line(lists[i].name, "unmap", status, " iova=", lists[i].iova,
			  lists[i].pages);
	}
}

/* --- the cases ------------------------------------------------------------ */

struct value {
	const char *name;
	u64 value;
};

static void probes(void)
{
	static const struct value bad_pages[] = {
		{ "byte-1", 1 },
		{ "2^53", 1ull << 53 },
		{ "2^63", 1ull << 63 },
		{ "2^64-4096", 0ull - PAGE },
		{ "2^64-1", ~0ull },
	};
	u32 i;

	set_call(PVDMA_CALL_PROBE, PVDMA_ABI_VERSION, 0);
	make_call(registers_out32, "probe", "plain");
	set_call(PVDMA_CALL_PROBE, PVDMA_ABI_VERSION, (u64)call_page);
	make_call(registers_out32, "probe", "ranges");
	print("range 0x%lx 0x%lx\n", (unsigned long)call_page[0].address,
	      (unsigned long)call_page[0].bytes);
	/* the call number is EAX; the rest of RAX is nothing */
	set_call(0xdeadbeef00000000ull | PVDMA_CALL_PROBE, ~0ull, 0);
	make_call(registers_out32, "probe", "rax-above-32-bits");
	/* an OUT register that held its result already, but for rounding */
	set_call(PVDMA_CALL_PROBE, ~0ull, 0);
	now.r8 = 0xfffffffffffff001ull;
	make_call(registers_out32, "probe", "nearly-the-result");

	for (i = 0; i < sizeof(bad_pages) / sizeof(bad_pages[0]); i++) {
		set_call(PVDMA_CALL_PROBE, PVDMA_ABI_VERSION, bad_pages[i].value);
		make_call(registers_out32, "probe-page", bad_pages[i].name);
	}
	set_call(PVDMA_CALL_PROBE, PVDMA_ABI_VERSION, (u64)call_page + 16);
	make_call(registers_out32, "probe-page", "unaligned");
	set_call(PVDMA_CALL_PROBE, PVDMA_ABI_VERSION, guest_ram.low_end);
	make_call(registers_out32, "probe-page", "end-of-ram");
	set_call(PVDMA_CALL_PROBE, PVDMA_ABI_VERSION, 0xfee00000);
	make_call(registers_out32, "probe-page", "hole");
}

static void assignments(void)
{
	static const struct value none[] = {
		{ "2^16", 1u << 16 },
		{ "2^32-1", 0xffffffff },
		{ "2^53", 1ull << 53 },
		{ "2^64-1", ~0ull },
	};
	u32 i;

	for (i = 0; i < sizeof(none) / sizeof(none[0]); i++) {
		set_call(PVDMA_CALL_IS_ASSIGNED, none[i].value, 0);
		make_call(registers_out32, "is_assigned", none[i].name);
	}
	set_call(PVDMA_CALL_IS_ASSIGNED, first_rid | 1ull << 32, 0);
	make_call(registers_out32, "is_assigned", "above-32-bits");
	set_call(PVDMA_CALL_IS_ASSIGNED, first_rid + 1, 0);
	make_call(registers_out32, "is_assigned", "other-function");
}

/* Numbers of which a part is a call: it must not be taken for it. */
static void unknown_calls(void)
{
	static const struct value numbers[] = {
		{ "0", 0 },
		{ "9", PVDMA_CALL_TABLE + 1 },
		{ "99", NO_CALL },
		{ "2^8+4", 1u << 8 | PVDMA_CALL_UNMAP },
		{ "2^16+4", 1u << 16 | PVDMA_CALL_UNMAP },
		{ "2^31+4", 1u << 31 | PVDMA_CALL_UNMAP },
		{ "2^32-1", 0xffffffff },
	};
	u32 i;

	for (i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
		set_unmap(first_handle, innocents[ONE_PAGE].iova, innocents[ONE_PAGE].bytes);
		now.rax = numbers[i].value;
		make_call(registers_out32, "unknown", numbers[i].name);
	}
}

static void bad_handles(void)
{
	const struct value handles[] = {
		{ "0", 0 },
		{ "next", devices + 1 },
		{ "33", PVDMA_DEVICES_MAX + 1 },
		{ "2^31+1", (1u << 31) + 1 },
		{ "2^32", 1ull << 32 },
		{ "2^32+1", (1ull << 32) + 1 },
		{ "2^53+1", (1ull << 53) + 1 },
		{ "2^63", 1ull << 63 },
		{ "2^63+1", (1ull << 63) + 1 },
		{ "2^64-1", ~0ull },
	};
	u32 i;

	for (i = 0; i < sizeof(handles) / sizeof(handles[0]); i++) {
		set_map(handles[i].value, SCRATCH, PAGE, ANY_IOVA, READ_WRITE);
		make_call(registers_out32, "map-handle", handles[i].name);
		set_unmap(handles[i].value, innocents[ONE_PAGE].iova, innocents[ONE_PAGE].bytes);
		make_call(registers_out32, "unmap-handle", handles[i].name);
		five_entries();
		set_map_list(handles[i].value, (u64)call_page, 5, ANY_IOVA, READ_WRITE);
		make_call(registers_out32, "map_list-handle", handles[i].name);
		entry(0, innocents[ONE_PAGE].iova, innocents[ONE_PAGE].bytes);
		set_unmap_list(handles[i].value, (u64)call_page, 1);
		make_call(registers_out32, "unmap_list-handle", handles[i].name);
		set_call(PVDMA_CALL_RELEASE, handles[i].value, innocents[ONE_PAGE].iova);
		make_call(registers_out32, "release-handle", handles[i].name);
		set_call(PVDMA_CALL_TABLE, handles[i].value, 0);
		make_call(registers_out32, "table-handle", handles[i].name);
	}
	if (devices < 2)
		return;
	set_unmap(second_handle, innocents[ONE_PAGE].iova, innocents[ONE_PAGE].bytes);
	make_call(registers_out32, "unmap-handle", "other-device");
	set_unmap_list(second_handle, (u64)call_page, 1);
	make_call(registers_out32, "unmap_list-handle", "other-device");
}

static void bad_maps(void)
{
	const u64 end = guest_ram.low_end, gib = 1ull << 30;
	static const struct value flags[] = {
		{ "0", 0 },
		{ "align-only", PVDMA_MAP_ALIGN },
		{ "counted", PVDMA_MAP_COUNTED },
		{ "3+counted", READ_WRITE | PVDMA_MAP_COUNTED },
		{ "3+16", READ_WRITE | 16 },
		{ "3+2^31", READ_WRITE | 1u << 31 },
		{ "3+2^32", READ_WRITE | 1ull << 32 },
		{ "3+2^63", READ_WRITE | 1ull << 63 },
		{ "2^64-1", ~0ull },
	};
	u32 i;

	map("end-of-ram", end, PAGE, ANY_IOVA, READ_WRITE);
	map("last-byte-and-next", end - 1, 2, ANY_IOVA, READ_WRITE);
	map("last-page-and-next", end - PAGE, PAGE + 1, ANY_IOVA, READ_WRITE);
	map("last-pages-in-offset", end - 2 * PAGE + 1, 2 * PAGE, ANY_IOVA, READ_WRITE);
	map("pci-window", 0xd0000000, PAGE, ANY_IOVA, READ_WRITE);
	map("ecam", 0xe0000000, PAGE, ANY_IOVA, READ_WRITE);
	map("local-apic", 0xfee00000, PAGE, ANY_IOVA, READ_WRITE);
	map("below-4GiB", (1ull << 32) - PAGE, 2 * PAGE, ANY_IOVA, READ_WRITE);
	if (guest_ram.high_end) {
		map("high-end", guest_ram.high_end, 1, ANY_IOVA, READ_WRITE);
		map("high-last-and-next", guest_ram.high_end - 1, 2, ANY_IOVA, READ_WRITE);
	}
	map("gpa-2^44", 1ull << 44, PAGE, ANY_IOVA, READ_WRITE);
	map("gpa-2^44+scratch", (1ull << 44) + SCRATCH, PAGE, ANY_IOVA, READ_WRITE);
	map("gpa-2^53-1", (1ull << 53) - 1, 1, ANY_IOVA, READ_WRITE);
	map("gpa-2^53+scratch", (1ull << 53) + SCRATCH, PAGE, ANY_IOVA, READ_WRITE);
	map("gpa-2^63+scratch", (1ull << 63) + SCRATCH, PAGE, ANY_IOVA, READ_WRITE);
	map("gpa-2^64-1", ~0ull, 1, ANY_IOVA, READ_WRITE);
	map("gpa-wraps-to-0", 0ull - PAGE, 2 * PAGE, ANY_IOVA, READ_WRITE);

	map("bytes-0", SCRATCH, 0, ANY_IOVA, READ_WRITE);
	map("bytes-1GiB+1", SCRATCH, gib + 1, ANY_IOVA, READ_WRITE);
	map("pages-1GiB+1", 1, gib, ANY_IOVA, READ_WRITE);
	map("bytes-2^32", SCRATCH, 1ull << 32, ANY_IOVA, READ_WRITE);
	map("bytes-2^32+4096", SCRATCH, (1ull << 32) + PAGE, ANY_IOVA, READ_WRITE);
	map("bytes-2^63", SCRATCH, 1ull << 63, ANY_IOVA, READ_WRITE);
	map("bytes-wrap", SCRATCH, PAGE - SCRATCH, ANY_IOVA, READ_WRITE);
	map("bytes-2^64-1", SCRATCH, ~0ull, ANY_IOVA, READ_WRITE);

	map("iova-max-0", SCRATCH, PAGE, 0, READ_WRITE);
	map("iova-max-4094", SCRATCH, PAGE, PAGE - 2, READ_WRITE);
	map("iova-max-1MiB", SCRATCH, PAGE, 0xfffff, READ_WRITE);

	for (i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
		set_map(first_handle, SCRATCH, PAGE, ANY_IOVA, flags[i].value);
		make_call(registers_out32, "map-flags", flags[i].name);
	}
}

static void bad_unmaps(void)
{
	const struct innocent *pages = &innocents[PAGES];
	u64 list = lists[SCATTERED].iova, iova;

	unmap("never-0", 0, PAGE);
	unmap("never-4096", PAGE, PAGE);
	unmap("never-2^44", 1ull << 44, PAGE);
	unmap("never-2^44+innocent", (1ull << 44) + pages->iova, pages->bytes);
	unmap("never-2^53+innocent", (1ull << 53) + pages->iova, pages->bytes);
	unmap("never-2^63+innocent", (1ull << 63) + pages->iova, pages->bytes);
	unmap("never-2^64-1", ~0ull, 1);
	unmap("wraps-to-0", 0ull - PAGE, 2 * PAGE);
	unmap("bytes-0", pages->iova, 0);
	unmap("bytes-1GiB+1", pages->iova, (1ull << 30) + 1);
	unmap("bytes-2^32+right", pages->iova, (1ull << 32) + pages->bytes);
	unmap("bytes-wrap", pages->iova, PAGE - pages->iova);
	unmap("bytes-2^64-1", pages->iova, ~0ull);
	unmap("one-page-short", pages->iova, pages->bytes - PAGE);
	unmap("one-page-long", pages->iova, pages->bytes + PAGE);
	unmap("from-the-second", pages->iova + PAGE, pages->bytes - PAGE);
	unmap("second-page", (pages->iova & ~(PAGE - 1)) + PAGE, PAGE);
	unmap("last-page", (pages->iova & ~(PAGE - 1)) + 4 * PAGE, PAGE);
	unmap("first-of-list", list, 2 * PAGE);
	unmap("second-of-list", list + 2 * PAGE, PAGE);

	iova = map_page("for-twice", SCRATCH);
	unmap("once", iova + 1, PAGE - 1);
	unmap("twice", iova, PAGE);
}

static void bad_map_lists(void)
{
	static const struct value counts[] = {
		{ "0", 0 },
		{ "257", PVDMA_LIST_ENTRIES + 1 },
		{ "2^32", 1ull << 32 },
		{ "2^32+5", (1ull << 32) + 5 },
		{ "2^53+5", (1ull << 53) + 5 },
		{ "2^64-1", ~0ull },
	};
	const struct value pages[] = {
		{ "unaligned", (u64)call_page + 8 },
		{ "end-of-ram", guest_ram.low_end },
		{ "hole", 0xfee00000 },
		{ "2^53+page", (1ull << 53) + (u64)call_page },
		{ "2^64-4096", 0ull - PAGE },
		{ "2^64-1", ~0ull },
	};
	const struct {
		const char *name;
		u32 index;
		u64 gpa, bytes;
	} bad[] = {
		{ "first", 0, guest_ram.low_end, PAGE },
		{ "middle", 2, guest_ram.low_end, PAGE },
		{ "last", 4, guest_ram.low_end, PAGE },
		{ "hole", 2, 0xe0000000, PAGE },
		{ "crossing", 2, guest_ram.low_end - PAGE, 2 * PAGE },
		{ "gpa-2^63", 2, 1ull << 63 | SCRATCH, PAGE },
		{ "gpa-2^64-1", 2, ~0ull, 1 },
		{ "bytes-0", 2, SCRATCH, 0 },
		{ "bytes-2^32+4096", 2, SCRATCH, (1ull << 32) + PAGE },
		{ "bytes-wrap", 2, SCRATCH, PAGE - SCRATCH },
		{ "bytes-2^64-1", 2, SCRATCH, ~0ull },
	};
	u32 i;

	for (i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
		five_entries();
		set_map_list(first_handle, (u64)call_page, counts[i].value, ANY_IOVA, READ_WRITE);
		make_call(registers_out32, "map_list-count", counts[i].name);
		set_unmap_list(first_handle, (u64)call_page, counts[i].value);
		make_call(registers_out32, "unmap_list-count", counts[i].name);
	}
	for (i = 0; i < sizeof(pages) / sizeof(pages[0]); i++) {
		set_map_list(first_handle, pages[i].value, 5, ANY_IOVA, READ_WRITE);
		make_call(registers_out32, "map_list-page", pages[i].name);
		set_unmap_list(first_handle, pages[i].value, 5);
		make_call(registers_out32, "unmap_list-page", pages[i].name);
	}
	for (i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		five_entries();
		entry(bad[i].index, bad[i].gpa, bad[i].bytes);
		set_map_list(first_handle, (u64)call_page, 5, ANY_IOVA, READ_WRITE);
		make_call(registers_out32, "map_list-entry", bad[i].name);
	}
	five_entries();
	map_list("flags-0", (u64)call_page, 5, ANY_IOVA, 0);
	map_list("flags-3+2^32", (u64)call_page, 5, ANY_IOVA, READ_WRITE | 1ull << 32);
	map_list("iova-max-1MiB", (u64)call_page, 5, 0xfffff, READ_WRITE);
	/* 16 entries of 64 MiB are all that one call maps */
	for (i = 0; i < PVDMA_LIST_ENTRIES; i++)
		entry(i, 0, 64 << 20);
	map_list("pages-in-all", (u64)call_page, PVDMA_LIST_ENTRIES, ANY_IOVA, READ_WRITE);
	/* and this is how it should be */
	five_entries();
	map_list("good", (u64)call_page, 5, ANY_IOVA, READ_WRITE);
	unmap("of-list", now.rdi, 5 * PAGE);
}

static void bad_unmap_lists(void)
{
	u64 a = map_page("for-list-a", SCRATCH);
	u64 b = map_page("for-list-b", SCRATCH + PAGE);
	u64 c = map_page("for-list-c", SCRATCH + 2 * PAGE);

	entry(0, 0, PAGE);
	entry(1, a, PAGE);
	unmap_list("first-never-mapped", (u64)call_page, 2);
	entry(0, a, PAGE);
	entry(1, ~0ull, PAGE);
	entry(2, b, PAGE);
	unmap_list("middle-never-mapped", (u64)call_page, 3);
	unmap("done-by-list", a, PAGE);
	entry(0, b, PAGE);
	entry(1, c, 2 * PAGE);
	unmap_list("last-wrong-size", (u64)call_page, 2);
	entry(0, c, PAGE);
	entry(1, c, PAGE);
	entry(2, innocents[ONE_PAGE].iova, PAGE);
	unmap_list("one-twice", (u64)call_page, 3);
	entry(0, innocents[PAGES].iova, 0);
	unmap_list("bytes-0", (u64)call_page, 1);
	entry(0, innocents[PAGES].iova, ~0ull);
	unmap_list("bytes-2^64-1", (u64)call_page, 1);
	entry(0, innocents[PAGES].iova + PAGE, PAGE);
	unmap_list("in-a-mapping", (u64)call_page, 1);
}

/* There is none with this policy, and so nothing to begin anew. */
static void tables(void)
{
	if (!devices)
		return;
	set_call(PVDMA_CALL_TABLE, first_handle, 0);
	make_call(registers_out32, "table", "strict");
	set_call(PVDMA_CALL_TABLE, first_handle, 1);
	make_call(registers_out32, "table", "anew");
	set_call(PVDMA_CALL_TABLE, first_handle, 2);
	make_call(registers_out32, "table", "2");
	set_call(PVDMA_CALL_TABLE, first_handle, 1ull << 53 | 1);
	make_call(registers_out32, "table", "2^53+1");
}

/* Everything of the second device, and nothing of the first. */
static void releases(void)
{
	u64 iova;

	if (devices < 2)
		return;
	set_call(PVDMA_CALL_RELEASE, second_handle, 0);
	make_call(registers_out32, "release", "nothing");
	set_map(second_handle, SCRATCH + 0x123, PAGE, ANY_IOVA, READ_WRITE);
	make_call(registers_out32, "map", "for-release");
	iova = now.rdi;
	five_entries();
	set_map_list(second_handle, (u64)call_page, 5, ANY_IOVA, READ_WRITE);
	make_call(registers_out32, "map_list", "for-release");
	set_call(PVDMA_CALL_RELEASE, second_handle, 0);
	make_call(registers_out32, "release", "two");
	set_call(PVDMA_CALL_RELEASE, second_handle, 0);
	make_call(registers_out32, "release", "twice");
	set_unmap(second_handle, iova, PAGE);
	make_call(registers_out32, "unmap", "released");
}

/* Executes something that is no call, though the registers hold a good one. */
static void no_call(instruction *execute, const char *group, const char *variant)
{
	copy_call_page();
	expected = now;
	if (execute == registers_outs32 || execute == registers_rep_outs32) {
		u64 times = execute == registers_outs32 ? 1 : now.rcx;

		expected.rsi += 4 * times;
		if (execute == registers_rep_outs32)
			expected.rcx = 0;
	} else if (execute == registers_in32) {
		expected.rax = 0xffffffff;
	}
	execute(&now);
	print_case(group, variant, "none");
	print(" - 0");
	print_verdict(false);
}

static void no_calls(void)
{
	static u32 words[3];
	const struct innocent *one = &innocents[ONE_PAGE];
	static const struct value beside[] = {
		{ "port-3", -3ull }, { "port-1", -1ull }, { "port+1", 1 }, { "port+4", 4 },
	};
	u32 i;

	set_unmap(first_handle, one->iova, one->bytes);
	no_call(registers_out16, "no-call", "out-16-bit");
	set_unmap(first_handle, one->iova, one->bytes);
	no_call(registers_out8, "no-call", "out-8-bit");
	set_unmap(first_handle, one->iova, one->bytes);
	no_call(registers_in32, "no-call", "in-32-bit");
	for (i = 0; i < sizeof(beside) / sizeof(beside[0]); i++) {
		set_unmap(first_handle, one->iova, one->bytes);
		now.rdx += beside[i].value;
		no_call(registers_out32, "no-call", beside[i].name);
	}

	for (i = 0; i < 3; i++)
		words[i] = PVDMA_CALL_UNMAP;
	set_call(NO_CALL, first_handle, (u64)words);
	no_call(registers_outs32, "no-call", "outs-of-call");
	set_call(NO_CALL, first_handle, (u64)words);
	now.rcx = 3;
	no_call(registers_rep_outs32, "no-call", "rep-outs-of-call");
	for (i = 0; i < 3; i++)
		words[i] = NO_CALL;
	set_call(PVDMA_CALL_PROBE, first_handle, (u64)words);
	no_call(registers_outs32, "no-call", "outs-beside-call");
}

static void from_cpl3(void)
{
	const struct innocent *one = &innocents[ONE_PAGE];

	set_call(PVDMA_CALL_PROBE, PVDMA_ABI_VERSION, (u64)call_page);
	make_call(user_out32, "cpl3", "probe");
	set_call(PVDMA_CALL_IS_ASSIGNED, first_rid, 0);
	make_call(user_out32, "cpl3", "is_assigned");
	set_map(first_handle, SCRATCH, PAGE, ANY_IOVA, READ_WRITE);
	make_call(user_out32, "cpl3", "map");
	set_unmap(first_handle, one->iova, one->bytes);
	make_call(user_out32, "cpl3", "unmap");
	five_entries();
	set_map_list(first_handle, (u64)call_page, 5, ANY_IOVA, READ_WRITE);
	make_call(user_out32, "cpl3", "map_list");
	entry(0, one->iova, one->bytes);
	set_unmap_list(first_handle, (u64)call_page, 1);
	make_call(user_out32, "cpl3", "unmap_list");
	set_call(PVDMA_CALL_RELEASE, first_handle, 0);
	make_call(user_out32, "cpl3", "release");
	set_call(NO_CALL, first_handle, one->iova);
	make_call(user_out32, "cpl3", "99");
	set_unmap(first_handle, one->iova, one->bytes);
	no_call(user_out16, "no-call", "cpl3-out-16-bit");
}

/* --- the order of things -------------------------------------------------- */

/* Asks for every device on the bus; false when the host does not answer. */
static bool find_devices(void)
{
	struct pvdma_assignment answer;
	u32 slot;

	first_rid = 1 << 3;
	for (slot = 0; slot < 32; slot++) {
		u32 rid = slot << 3, status;

		if ((pci_read(slot, 0, 0) & 0xffff) == 0xffff)
			continue;
		status = pvdma_is_assigned(&host, &counters, rid, &answer);
		if (PVDMA_STATUS_CLASS(status) != PVDMA_STATUS_OK) {
			print("guest: is_assigned of slot %u:", slot);
			print_status(status);
			print("\n");
			return false;
		}
		print("device slot=%u handle=%u policy=%s identity=%u iova_bits=%u\n", slot,
		      answer.handle, pvdma_policy_name(answer.policy), answer.identity,
		      answer.iova_bits);
		if (!answer.handle)
			continue;
		if (++devices == 1) {
			first_handle = answer.handle;
			first_rid = rid;
		} else if (devices == 2) {
			second_handle = answer.handle;
		}
	}
	return true;
}

static void pause_at(const char *what)
{
	if (!has_option("pause"))
		return;
	print("pause %s\n", what);
	serial_read();
}

void guest_main(void)
{
	u32 i;

	if (pvdma_discover(&host) != PVDMA_FOUND) {
		print("guest: no pvdma host\n");
		return;
	}
	print("host version=0x%x features=0x%x port=0x%x list_entries=%u map_pages=%lu\n",
	      host.version, host.features, host.port, host.list_entries,
	      (unsigned long)host.map_pages);
	if (!find_devices())
		return;
	print("guest devices=%u low_end=0x%lx high_end=0x%lx\n", devices,
	      (unsigned long)guest_ram.low_end, (unsigned long)guest_ram.high_end);

	map_innocents();
	probes();
	assignments();
	unknown_calls();
	bad_handles();
	bad_maps();
	bad_unmaps();
	bad_map_lists();
	bad_unmap_lists();
	tables();
	releases();
	no_calls();
	from_cpl3();
	pause_at("innocents");
	unmap_innocents();
	for (i = 0; i <= TWIN; i++)
		unmap(innocents[i].name, innocents[i].iova, innocents[i].bytes);
	set_call(PVDMA_CALL_RELEASE, first_handle, 0);
	make_call(registers_out32, "release", "nothing-left");
	print("core outstanding=%lu mapped=%lu unmapped=%lu\n",
	      (unsigned long)counters.outstanding, (unsigned long)counters.pages_mapped,
	      (unsigned long)counters.pages_unmapped);
	pause_at("end");
	print("guest: end\n");
}
