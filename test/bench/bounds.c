/* SPDX-License-Identifier: MIT */
/*
 * What the host's kernel alone costs, without a VMM: an exit to user space and back,
 * a page mapped and unmapped through VFIO, and both together, each map and each unmap
 * after an exit, as a VMM makes them: bounds for all that exit and map as ours does.
 *
 *	bounds exit			a guest that makes calls for ever, each refused
 *	bounds vfio GROUP BDF		/dev/vfio/GROUP, without a guest, and with that one
 *
 * Prints lines `NAME NANOSECONDS…', a figure for each of ROUNDS rounds; `exit' also a
 * line `cycles', the time stamp counter's in a millisecond.
 */
#include "pvdma_abi.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define PAGE		4096ul
#define LIST		64u
#define ROUNDS		5u
#define BATCH		16u
#define ROUND_NS	500000000ul
#define TSS_GPA		0xfeffd000ul	/* three pages for KVM, on Intel */

/* Intel SDM 3A, 2.2.1, 2.5 and 4.5 */
#define CR0_PE		1ul
#define CR0_ET		(1ul << 4)
#define CR0_NE		(1ul << 5)
#define CR0_PG		(1ul << 31)
#define CR4_PAE		(1ul << 5)
#define EFER_LME	(1ul << 8)
#define EFER_LMA	(1ul << 10)
#define PTE_PRESENT	1ul
#define PTE_WRITE	2ul
#define PTE_LARGE	(1ul << 7)

static void check(int failed, const char *what)
{
	if (!failed)
		return;
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1000000000ul + at.tv_nsec;
}

/* Repeats a function for so long, ROUNDS times, and prints what one call took. */
static void measure(const char *name, void (*once)(void))
{
	unsigned int round, i;

	once();
	printf("%s", name);
	for (round = 0; round < ROUNDS; round++) {
		uint64_t start = now(), end;
		unsigned long count = 0;

		do {
			/* to look at the clock takes a good part of what is measured */
			for (i = 0; i < BATCH; i++)
				once();
			count += BATCH;
			end = now();
		} while (end - start < ROUND_NS);
		printf(" %lu", (unsigned long)((end - start) / count));
	}
	printf("\n");
	fflush(stdout);
}

static int container;
static char *memory;

static void map(uint64_t iova, char *at)
{
	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof(map), .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = (uintptr_t)at, .iova = iova, .size = PAGE,
	};

	check(ioctl(container, VFIO_IOMMU_MAP_DMA, &map), "VFIO_IOMMU_MAP_DMA");
}

static void unmap(uint64_t iova, uint64_t bytes)
{
	struct vfio_iommu_type1_dma_unmap unmap = {
		.argsz = sizeof(unmap), .iova = iova, .size = bytes,
	};

	check(ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap), "VFIO_IOMMU_UNMAP_DMA");
}

static void pair(void)
{
	map(1 << 20, memory);
	unmap(1 << 20, PAGE);
}

static void map_list(void)
{
	unsigned int i;

	for (i = 0; i < LIST; i++)
		map((1 << 20) + i * PAGE, memory + 2 * i * PAGE);
}

static void list(void)
{
	map_list();
	unmap(1 << 20, LIST * PAGE);
}

static void open_vfio(const char *group_name, const char *bdf)
{
	char path[64];
	int group;

	snprintf(path, sizeof(path), "/dev/vfio/%s", group_name);
	container = open("/dev/vfio/vfio", O_RDWR);
	check(container < 0, "/dev/vfio/vfio");
	group = open(path, O_RDWR);
	check(group < 0, path);
	check(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "VFIO_GROUP_SET_CONTAINER");
	check(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "VFIO_SET_IOMMU");
	check(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, bdf) < 0, bdf);
	memory = mmap(NULL, 2 * LIST * PAGE, PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	check(memory == MAP_FAILED, "mmap");
}

static void cycles(void)
{
	uint64_t start = now(), first = __rdtsc();

	while (now() - start < ROUND_NS)
		;
	printf("cycles %llu\n", (__rdtsc() - first) * 1000000 / (now() - start));
}

static int vcpu;
static struct kvm_run *run;

/* Looks at a call as little as it can be looked at, and refuses it: a handle that is nobody's. */
static void leave(void)
{
	struct kvm_regs *regs = &run->s.regs.regs;

	check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
	if (run->exit_reason != KVM_EXIT_IO || run->io.port != PVDMA_PORT || run->io.size != 4 ||
	    run->s.regs.sregs.ss.dpl != 0 || regs->rax != PVDMA_CALL_UNMAP || regs->rdi != 0) {
		fprintf(stderr, "exit reason %u, call %llu: not the call that is made here\n",
			run->exit_reason, regs->rax);
		exit(1);
	}
	regs->rax = PVDMA_STATUS_INVALID | ENODEV << 8;
	run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
}

/*
 * As a VMM has to, but without books. The guest asks for what leave() refuses, still: a right
 * call would take the same way. After an exit the ioctls run colder than without a guest, so
 * this is more than the sum of the others.
 */
static void served_pair(void)
{
	leave();
	map(1 << 20, memory);
	leave();
	unmap(1 << 20, PAGE);
}

static void served_list(void)
{
	leave();
	map_list();
	leave();
	unmap(1 << 20, LIST * PAGE);
}

/*
 * 64-bit mode at CPL 0, with one page of 2 MiB mapped one to one; @tables is where in @ram its
 * three tables go.
 */
static void long_mode(struct kvm_sregs *sregs, char *ram, uint64_t tables)
{
	const struct kvm_segment code = {
		.limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1,
	};
	const struct kvm_segment data = {
		.limit = ~0u, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1,
	};
	uint64_t *entries = (uint64_t *)(ram + tables);
	const unsigned int per_page = PAGE / sizeof(*entries);

	entries[0] = (tables + PAGE) | PTE_PRESENT | PTE_WRITE;
	entries[per_page] = (tables + 2 * PAGE) | PTE_PRESENT | PTE_WRITE;
	entries[2 * per_page] = PTE_PRESENT | PTE_WRITE | PTE_LARGE;
	sregs->cr3 = tables;
	sregs->cr4 = CR4_PAE;
	sregs->efer = EFER_LME | EFER_LMA;
	sregs->cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
	sregs->cs = code;
	sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = data;
}

/*
 * A guest that makes calls and does nothing else: the instructions of test/guest/exits.c, in
 * the same mode, since some hosts emulate them; and a VM with the interrupt controllers in the
 * kernel, as ours. l: mov $PVDMA_CALL_UNMAP, %eax; out %eax, (%dx); dec %ecx; jnz l; jmp l
 */
static void start_guest(void)
{
	static const uint8_t code[] = {
		0xb8, PVDMA_CALL_UNMAP, 0, 0, 0, 0xef, 0xff, 0xc9, 0x75, 0xf6, 0xeb, 0xf4,
	};
	struct kvm_userspace_memory_region region = { .memory_size = 16 * PAGE };
	struct kvm_regs regs = {
		.rflags = 2, .rdx = PVDMA_PORT, .rip = PAGE, .rsi = PAGE, .r8 = PAGE,
	};
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid = { .head.nent = 256 };
	struct kvm_sregs sregs;
	char *ram;
	int kvm = open("/dev/kvm", O_RDWR);
	int vm, size;

	check(kvm < 0, "/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	check(vm < 0, "KVM_CREATE_VM");
	check(ioctl(vm, KVM_SET_TSS_ADDR, TSS_GPA), "KVM_SET_TSS_ADDR");
	check(ioctl(vm, KVM_CREATE_IRQCHIP, NULL), "KVM_CREATE_IRQCHIP");
	ram = mmap(NULL, region.memory_size, PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(ram == MAP_FAILED, "mmap");
	memcpy(ram + PAGE, code, sizeof(code));
	region.userspace_addr = (uintptr_t)ram;
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	check(vcpu < 0, "KVM_CREATE_VCPU");
	/* without these it has no 64-bit mode */
	check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
	check(ioctl(vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
	size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	check(run == MAP_FAILED, "mmap");
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	long_mode(&sregs, ram, 4 * PAGE);
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	run->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "exit")) {
		start_guest();
		measure("exit", leave);
		cycles();
	} else if (argc == 4 && !strcmp(argv[1], "vfio")) {
		open_vfio(argv[2], argv[3]);
		measure("vfio-pair", pair);
		measure("vfio-list", list);
		start_guest();
		measure("served-pair", served_pair);
		measure("served-list", served_list);
	} else {
		return 2;
	}
	return 0;
}
