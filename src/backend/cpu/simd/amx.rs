//! Intel AMX: the tile unit of Sapphire Rapids and later, in bf16 and int8. Linux only, because a process has to ask the kernel
//! for the tile registers.
//!
//! Stable Rust has no intrinsics for AMX, so each operation is an `asm!` block. The tile registers keep their contents from one
//! block to the next: the compiler itself generates no tile instructions.
//!
//! AMX-FP16 (Granite Rapids) is detected and not used. Its rate is that of bf16, and its three more bits of mantissa come with
//! f16's range: activations above 65,504, which some models have, would become infinite.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::fmt;
use std::sync::OnceLock;

use super::tiles::{TILE_WORDS, TileTwin, Tiles};

/// Proof that the tile unit can be used by this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Amx(());

/// Why the tile unit is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AmxRefusal {
    /// The processor or the operating system does not have it.
    Missing,
    /// The kernel does not give this process the tile registers. The system call's result, a negative error number.
    Permission(isize),
    /// Its results are not those of the portable twin.
    WrongResults,
}

impl fmt::Display for AmxRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("this processor or operating system has no AMX"),
            Self::Permission(error) => {
                write!(f, "the kernel refuses the tile registers (arch_prctl ARCH_REQ_XCOMP_PERM: error {})", -error)
            }
            Self::WrongResults => f.write_str("AMX computes other results than its portable model"),
        }
    }
}

impl Amx {
    /// Asks for the tile unit, once per process, and checks it. Logs the outcome if the processor has one.
    pub(super) fn detect() -> Option<Self> {
        static FOUND: OnceLock<Option<Amx>> = OnceLock::new();
        *FOUND.get_or_init(|| match decide(processor_has_tiles(), request_permission, tiles_match_the_twin) {
            Ok(amx) => {
                let unused = if processor_has_fp16() { "; AMX-FP16 is not used (its range is too small)" } else { "" };
                tracing::info!("using AMX for bf16 and int8{unused}");
                Some(amx)
            }
            Err(AmxRefusal::Missing) => None,
            Err(refusal) => {
                tracing::warn!("not using AMX: {refusal}; falling back to AVX-512");
                None
            }
        })
    }

    /// For tests, after `amx_emulator::install`.
    #[cfg(test)]
    pub(super) fn emulated() -> Self {
        Self(())
    }

    /// Configures this thread's tile registers.
    pub(super) fn configure(self) -> AmxTiles {
        /// The memory operand of `ldtilecfg`.
        #[repr(C, align(64))]
        struct TileConfig {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            bytes_per_row: [u16; 16],
            rows: [u8; 16],
        }
        static EIGHT_FULL_TILES: TileConfig = TileConfig {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        // SAFETY: a value of this type exists only if the kernel has given the tile registers to this process. The configuration
        // is valid.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const EIGHT_FULL_TILES, options(nostack, readonly, preserves_flags))
        };
        AmxTiles(())
    }
}

/// Decides whether the tile unit is used. The kernel's answer is trusted: no tile instruction runs without its permission.
fn decide(
    has_tiles: bool,
    request_permission: impl FnOnce() -> Result<(), isize>,
    results_are_right: impl FnOnce(Amx) -> bool,
) -> Result<Amx, AmxRefusal> {
    if !has_tiles {
        return Err(AmxRefusal::Missing);
    }
    request_permission().map_err(AmxRefusal::Permission)?;
    if results_are_right(Amx(())) { Ok(Amx(())) } else { Err(AmxRefusal::WrongResults) }
}

/// Whether the processor has tiles of the expected size with products of bf16 and int8, and the operating system saves them at
/// context switches.
fn processor_has_tiles() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const BF16_TILE_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const TILE_STATES: u64 = 0b11 << 17;
    #[target_feature(enable = "xsave")]
    fn enabled_states() -> u64 {
        // SAFETY: register 0 exists wherever OSXSAVE is set.
        unsafe { _xgetbv(0) }
    }
    if __cpuid(0).eax < 0x1d || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: OSXSAVE says that the instruction is enabled.
    let states = unsafe { enabled_states() };
    // Palette 1: tiles of 1,024 bytes, rows of 64 bytes, 8 tiles of 16 rows.
    let palette = __cpuid_count(0x1d, 1);
    __cpuid_count(7, 0).edx & BF16_TILE_INT8 == BF16_TILE_INT8
        && states & TILE_STATES == TILE_STATES
        && palette.eax >> 16 == 1024
        && palette.ebx == 8 << 16 | 64
        && palette.ecx & 0xffff == 16
}

/// Whether the processor has AMX-FP16.
fn processor_has_fp16() -> bool {
    __cpuid_count(7, 0).eax >= 1 && __cpuid_count(7, 1).eax & 1 << 21 != 0
}

/// Asks Linux for the tile registers, for all threads of the process. Returns the system call's result if it is not 0.
fn request_permission() -> Result<(), isize> {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let result: isize;
    // SAFETY: the system call reads and writes no memory. The kernel overwrites rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    if result == 0 { Ok(()) } else { Err(result) }
}

/// Compares products of random tiles with the twin's, in less than 10 ms.
fn tiles_match_the_twin(amx: Amx) -> bool {
    let mut random = fastrand::Rng::with_seed(1);
    (0..24).all(|round| first_difference(amx, &mut random, round).is_none())
}

/// The classes of random numbers that [`first_difference`] draws: about 1, products about the smallest normal number, subnormals,
/// overflows, a wide range, and any bits. The exponents are `center - spread..=center + spread`.
const CLASSES: [(i32, i32); 6] = [(127, 8), (63, 6), (1, 3), (190, 3), (127, 120), (127, 1000)];

/// Multiplies random tiles on the hardware and by the twin, in bf16 and int8. Returns the words of the first two sums that differ.
/// Two NaN are equal.
fn first_difference(amx: Amx, random: &mut fastrand::Rng, round: usize) -> Option<[u32; 2]> {
    let (center, spread) = CLASSES[round % CLASSES.len()];
    let mut number = || {
        let exponent = if spread > 255 { random.i32(0..256) } else { random.i32(center - spread..=center + spread) };
        random.u32(..) & 0x807f | (exponent.clamp(0, 255) as u32) << 7
    };
    let mut tile = || -> Vec<u32> { (0..TILE_WORDS).map(|_| number() | number() << 16).collect() };
    let (a, b) = (tile(), tile());
    let sums = if round.is_multiple_of(3) { vec![0; TILE_WORDS] } else { tile() };
    for int8 in [false, true] {
        let ours = product(&mut amx.configure(), int8, &sums, &a, &b);
        let twins = product(&mut TileTwin::new(), int8, &sums, &a, &b);
        let is_nan = |word: u32| !int8 && f32::from_bits(word).is_nan();
        let differ = |&(&x, &y): &(&u32, &u32)| x != y && !(is_nan(x) && is_nan(y));
        if let Some((&x, &y)) = ours.iter().zip(&twins).find(differ) {
            return Some([x, y]);
        }
    }
    None
}

/// `sums + a * b`. Twice, through all of the operations.
fn product(tiles: &mut impl Tiles, int8: bool, sums: &[u32], a: &[u32], b: &[u32]) -> Vec<u32> {
    let mut to = vec![0; 2 * TILE_WORDS];
    // SAFETY: each slice is a tile of rows without gaps; `to` is two.
    unsafe {
        tiles.load::<0>(sums.as_ptr(), 16);
        tiles.zero::<3>();
        tiles.load_streaming::<4>(a.as_ptr(), 16);
        tiles.load::<7>(b.as_ptr(), 16);
        if int8 {
            tiles.dot_int8::<0, 4, 7>();
            tiles.dot_int8::<3, 4, 7>();
        } else {
            tiles.dot_bf16::<0, 4, 7>();
            tiles.dot_bf16::<3, 4, 7>();
        }
        tiles.store::<0>(to.as_mut_ptr(), 16);
        tiles.store::<3>(to.as_mut_ptr().add(TILE_WORDS), 16);
    }
    to
}

/// This thread's configured tile registers; dropping it releases them.
pub(super) struct AmxTiles(());

impl Drop for AmxTiles {
    fn drop(&mut self) {
        // SAFETY: only `Amx::configure` creates a value, so the instruction exists.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// An `asm!` block of one tile instruction. Every tile register counts as overwritten.
macro_rules! tile_asm {
    ($($arguments:tt)*) => {
        // SAFETY: only `Amx::configure` creates the registers. The callers of the pointer methods guarantee valid pointers.
        unsafe {
            asm!(
                $($arguments)*
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            )
        }
    };
}

impl Tiles for AmxTiles {
    #[inline(always)]
    fn zero<const T: usize>(&mut self) {
        tile_asm!("tilezero tmm{t}", t = const T,)
    }
    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, from: *const u32, stride: usize) {
        tile_asm!("tileloadd tmm{t}, [{from} + {stride}]", t = const T, from = in(reg) from, stride = in(reg) 4 * stride,)
    }
    #[inline(always)]
    unsafe fn load_streaming<const T: usize>(&mut self, from: *const u32, stride: usize) {
        tile_asm!("tileloaddt1 tmm{t}, [{from} + {stride}]", t = const T, from = in(reg) from, stride = in(reg) 4 * stride,)
    }
    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, to: *mut u32, stride: usize) {
        tile_asm!("tilestored [{to} + {stride}], tmm{t}", t = const T, to = in(reg) to, stride = in(reg) 4 * stride,)
    }
    #[inline(always)]
    fn dot_bf16<const SUMS: usize, const A: usize, const B: usize>(&mut self) {
        tile_asm!("tdpbf16ps tmm{sums}, tmm{a}, tmm{b}", sums = const SUMS, a = const A, b = const B,)
    }
    #[inline(always)]
    fn dot_int8<const SUMS: usize, const A: usize, const B: usize>(&mut self) {
        tile_asm!("tdpbusd tmm{sums}, tmm{a}, tmm{b}", sums = const SUMS, a = const A, b = const B,)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_permission_or_with_wrong_results_amx_is_not_used() {
        let never = |_: Amx| -> bool { panic!("tile instructions without permission") };
        assert_eq!(decide(false, || panic!("asked for what does not exist"), never), Err(AmxRefusal::Missing));
        assert_eq!(decide(true, || Err(-1), never), Err(AmxRefusal::Permission(-1)));
        assert_eq!(decide(true, || Ok(()), |_| false), Err(AmxRefusal::WrongResults));
        assert_eq!(decide(true, || Ok(()), |_| true), Ok(Amx(())));
        assert!(AmxRefusal::Permission(-22).to_string().contains("error 22"));
    }

    /// Where there is no AMX, `golden::instruction_sets_that_this_machine_lacks_are_skips` reports it.
    #[test]
    fn hardware_and_twin_agree_bit_for_bit() {
        let Some(amx) = Amx::detect() else {
            // A processor without tiles must also not be asked for them.
            assert!(!processor_has_tiles() || request_permission().is_err(), "AMX is present, but was refused");
            return;
        };
        let mut random = fastrand::Rng::with_seed(2);
        for round in 0..2400 {
            let difference = first_difference(amx, &mut random, round);
            assert_eq!(difference, None, "round {round}");
        }
    }
}
