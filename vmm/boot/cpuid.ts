// What CPUID says to each vCPU: KVM's supported leaves, with the topology, the APIC id and our discovery block put in.
// Pure: entries in, entries out. Register values are unsigned 32-bit numbers.
// Source: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst.

import { ABI_VERSION, CPUID as DISCOVERY, FEATURES, LIMITS, PORT } from "../../hypercalls/abi.js";

/** struct kvm_cpuid_entry2. `flags` bit 0 (SIGNIFCANT_INDEX): `index` is ECX of the request. */
export interface CpuidEntry {
  readonly function: number;
  readonly index: number;
  readonly flags: number;
  readonly eax: number;
  readonly ebx: number;
  readonly ecx: number;
  readonly edx: number;
}

const SIGNIFICANT_INDEX = 1 << 0;
const LEAF1_ECX_TSC_DEADLINE = 1 << 24;
const LEAF1_ECX_HYPERVISOR = 2 ** 31;
const LEAF1_EDX_HTT = 1 << 28;
const EXT1_ECX_CMP_LEGACY = 1 << 1;
const TOPOLOGY_LEAVES = [0xb, 0x1f];
const LEVEL_SMT = 1;
const LEVEL_CORE = 2;

export interface VcpuIdentity {
  /** APIC id of this vCPU, 0 to cpus - 1. */
  readonly apicId: number;
  /** vCPUs of the guest: one socket, that many cores, one thread each. */
  readonly cpus: number;
  /** KVM_CAP_TSC_DEADLINE_TIMER: KVM_GET_SUPPORTED_CPUID does not say it. */
  readonly tscDeadline: boolean;
  /** FEATURE bits that the host offers; all by default. */
  readonly features?: number;
}

/** The entries for KVM_SET_CPUID2 of one vCPU. `supported` is what KVM_GET_SUPPORTED_CPUID returned. */
export function vcpuCpuid(supported: readonly CpuidEntry[], vcpu: VcpuIdentity): CpuidEntry[] {
  const kept = supported.filter((entry) => !TOPOLOGY_LEAVES.includes(entry.function) && !isDiscovery(entry));
  const highest = supported.find((entry) => entry.function === 0)?.eax ?? 0;
  const amd = isAmd(supported);
  return [
    ...kept.map((entry) => adapt(entry, vcpu, amd)),
    ...TOPOLOGY_LEAVES.filter((leaf) => leaf <= highest).flatMap((leaf) => topologyLeaf(leaf, vcpu)),
    ...discoveryBlock(vcpu.features ?? FEATURES),
  ];
}

/** Bits of a guest-physical address, 32 to 52: the CPU's, or fewer where nested paging translates fewer. */
export function physicalBits(supported: readonly CpuidEntry[]): number {
  const eax = supported.find((entry) => entry.function === 0x8000_0008)?.eax ?? 36;
  // Bits 23:16 (GuestPhysAddrSize): newer KVM says there what its page tables can map, 0 for "all".
  const width = Math.min(eax & 0xff, (eax >>> 16) & 0xff || 0xff);
  return Math.max(32, Math.min(width, 52));
}

const isDiscovery = (entry: CpuidEntry): boolean =>
  entry.function >= DISCOVERY.first && entry.function < DISCOVERY.first + DISCOVERY.step;

/** AMD and Hygon count cores where Intel counts threads. EBX of leaf 0 is the vendor's first four letters. */
function isAmd(entries: readonly CpuidEntry[]): boolean {
  const ebx = entries.find((entry) => entry.function === 0)?.ebx;
  return ebx === letters("Auth") || ebx === letters("Hygo");
}

function adapt(entry: CpuidEntry, { apicId, cpus, tscDeadline }: VcpuIdentity, amd: boolean): CpuidEntry {
  const { eax, ebx, ecx, edx } = entry;
  const several = cpus > 1;
  switch (entry.function) {
    case 0x1:
      return {
        ...entry,
        ebx: ((apicId << 24) | (cpus << 16) | (ebx & 0xffff)) >>> 0,
        ecx: withBits(withBits(ecx, LEAF1_ECX_HYPERVISOR, true), LEAF1_ECX_TSC_DEADLINE, tscDeadline),
        edx: withBits(edx, LEAF1_EDX_HTT, several),
      };
    case 0x4:
      // Type 0 ends the list. Bits 31:26: core ids in the package - 1; 25:14: threads that share the cache - 1.
      return (eax & 0x1f) === 0 ? entry : { ...entry, eax: cacheSharing(eax, cpus, idSpace(cpus) - 1) };
    case 0x8000_0001:
      return amd ? { ...entry, ecx: withBits(ecx, EXT1_ECX_CMP_LEGACY, several) } : entry;
    case 0x8000_0008:
      // ECX is AMD's: bits 7:0 threads - 1, 15:12 how many bits of the APIC id they take.
      return amd ? { ...entry, ecx: ((ecx & ~0xf0ff) | (idBits(cpus) << 12) | (cpus - 1)) >>> 0 } : entry;
    case 0x8000_001d:
      return (eax & 0x1f) === 0 ? entry : { ...entry, eax: cacheSharing(eax, cpus, 0) };
    case 0x8000_001e:
      // Extended APIC id; core id with one thread per core; node 0 of one.
      return { ...entry, eax: apicId, ebx: apicId, ecx: 0 };
    default:
      return entry;
  }
}

/** Leaf 4's and 0x8000001D's EAX: the last level belongs to the package, the levels before it to a core alone. */
function cacheSharing(eax: number, cpus: number, packageCores: number): number {
  const level = (eax >>> 5) & 7;
  const sharing = level >= 3 ? idSpace(cpus) - 1 : 0;
  return ((eax & 0x3fff) | (sharing << 14) | (packageCores << 26)) >>> 0;
}

/** Leaf 0xB or 0x1F: a level of threads (one per core), a level of cores, and the end of the list. */
function topologyLeaf(leaf: number, { apicId, cpus }: VcpuIdentity): CpuidEntry[] {
  const level = (index: number, shift: number, count: number, type: number): CpuidEntry => ({
    function: leaf,
    index,
    flags: SIGNIFICANT_INDEX,
    eax: shift,
    ebx: count,
    ecx: (type << 8) | index,
    edx: apicId,
  });
  return [level(0, 0, 1, LEVEL_SMT), level(1, idBits(cpus), cpus, LEVEL_CORE), level(2, 0, 0, 0)];
}

/** The leaf block by which the guest's module finds us: hypercalls/abi.ts, CPUID. */
function discoveryBlock(features: number): CpuidEntry[] {
  const leaf = (offset: number, eax: number, ebx = 0, ecx = 0, edx = 0): CpuidEntry => ({
    function: DISCOVERY.first + offset,
    index: 0,
    flags: 0,
    eax,
    ebx,
    ecx,
    edx,
  });
  const { signature, leafSignature, leafInterface, leafLimits } = DISCOVERY;
  const [ebx, ecx, edx] = [0, 4, 8].map((at) => letters(signature.slice(at, at + 4)));
  return [
    leaf(leafSignature, DISCOVERY.first + leafLimits, ebx, ecx, edx),
    leaf(leafInterface, ABI_VERSION, features, PORT, LIMITS.listEntries),
    leaf(leafLimits, LIMITS.mapPages),
  ];
}

const letters = (four: string): number => Buffer.from(four, "latin1").readUInt32LE(0);
const withBits = (value: number, bits: number, on: boolean): number =>
  (on ? value | bits : value & ~bits) >>> 0;
/** Bits that number `cpus` things, and the power of two that they span. */
const idBits = (cpus: number): number => Math.ceil(Math.log2(cpus));
const idSpace = (cpus: number): number => 2 ** idBits(cpus);
