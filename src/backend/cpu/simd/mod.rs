//! Instruction sets, detected at run time, behind the trait [`Isa`]. Every kernel is written once over the trait; each
//! instruction set is a short file of one-line methods.
//!
//! A kernel is a [`SimdOp`] whose `run` is `inline(always)`. It is called through [`Isa::enter`], which carries the
//! `target_feature`s; code inlined into it compiles to those instructions (the design of memchr's `Vector` and of the
//! crate pulp). A value of an instruction set's type proves that this machine supports it, because only
//! `detect` creates one.
//!
//! A path can also have a tile unit, behind the trait [`Tiles`]: kernels that use it are [`TileOp`]s.
//!
//! Vectors have 32-bit lanes. A lane of [`Isa::Floats`] is an f32; a lane of [`Isa::Bits`] is an f32, two bf16, four
//! int8, or an i32 sum.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod amx_emulator;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
mod partial;
mod portable;
mod tiles;

pub(super) use isa::{Accuracy, Isa, MAX_LANES, SimdOp, exp2};
pub(super) use partial::{load_partial, load_partial_bf16, store_partial, store_partial_bf16};
pub(super) use portable::Portable;
pub(super) use tiles::{TILE_SIZE, TILE_WORDS, TileOp, Tiles};
use tiles::{TileTwin, WithTiles};

/// The supported instruction sets. One is chosen at start and named in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SimdPath {
    /// Tiles for bf16 and int8, AVX-512 for everything else (Sapphire Rapids and later).
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(avx512::Avx512<true, true>, amx::Amx),
    /// AVX-512 with dot products of bf16 and int8 (Zen 4 and later, Sapphire Rapids and later).
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(avx512::Avx512<true, true>),
    /// AVX-512 with dot products of int8 (Cascade Lake, Ice Lake).
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(avx512::Avx512<false, true>),
    /// AVX-512 (Skylake-X).
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512<false, false>),
    /// AVX2 and FMA with 256-bit dot products of int8 (Alder Lake and later without AVX-512).
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni(avx2::Avx2<true>),
    /// AVX2 and FMA (Haswell to Zen 3).
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2<false>),
    /// NEON with dot products of bf16, and of unsigned by signed int8 (Neoverse V1 and N2, Apple M2, and later).
    #[cfg(target_arch = "aarch64")]
    NeonBf16I8mm(neon::Neon<true, true>),
    /// NEON with dot products of signed int8 (Neoverse N1, Apple M1).
    #[cfg(target_arch = "aarch64")]
    NeonDot(neon::Neon<false, true>),
    /// NEON (every AArch64 processor).
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon<false, false>),
    /// Plain Rust, which the compiler vectorizes for the target's baseline: SSE2 on x86-64.
    Portable(Portable),
    /// For tests only: the bits of [`Self::Amx`] without a tile unit.
    #[cfg(target_arch = "x86_64")]
    Avx512TileTwin(avx512::Avx512<true, true>),
    /// For tests only: as above, on any processor.
    PortableTileTwin(Portable),
}

impl SimdPath {
    /// Every path that this machine can run, best first.
    pub(super) fn supported() -> Vec<Self> {
        let mut paths = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = avx512::Avx512::<true, true>::detect();
            #[cfg(target_os = "linux")]
            paths.extend(avx512.zip(amx::Amx::detect()).map(|(avx512, amx)| Self::Amx(avx512, amx)));
            paths.extend(avx512.map(Self::Avx512Bf16));
            paths.extend(avx512::Avx512::<false, true>::detect().map(Self::Avx512Vnni));
            paths.extend(avx512::Avx512::<false, false>::detect().map(Self::Avx512));
            paths.extend(avx2::Avx2::<true>::detect().map(Self::Avx2Vnni));
            paths.extend(avx2::Avx2::<false>::detect().map(Self::Avx2));
        }
        #[cfg(target_arch = "aarch64")]
        {
            paths.extend(neon::Neon::<true, true>::detect().map(Self::NeonBf16I8mm));
            paths.extend(neon::Neon::<false, true>::detect().map(Self::NeonDot));
            paths.extend(neon::Neon::<false, false>::detect().map(Self::Neon));
        }
        paths.push(Self::Portable(Portable));
        paths
    }

    /// The path with the portable twin of the tile unit, for tests. Its vectors are those of [`Self::Amx`] if the machine has them.
    pub(super) fn tile_twin() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(avx512) = avx512::Avx512::<true, true>::detect() {
            return Self::Avx512TileTwin(avx512);
        }
        Self::PortableTileTwin(Portable)
    }

    /// The AMX path, for tests. Without a tile unit its instructions are emulated. `None` without AVX-512.
    #[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn amx_or_emulated() -> Option<Self> {
        let avx512 = avx512::Avx512::<true, true>::detect()?;
        let amx = amx::Amx::detect().unwrap_or_else(|| {
            amx_emulator::install();
            amx::Amx::emulated()
        });
        Some(Self::Amx(avx512, amx))
    }

    /// The names of this architecture's paths that the machine cannot run.
    pub(super) fn missing() -> Vec<&'static str> {
        let all: &[&str] = match () {
            #[cfg(target_arch = "x86_64")]
            () => &["AMX, AVX-512 BF16 VNNI", "AVX-512 BF16 VNNI", "AVX-512 VNNI", "AVX-512", "AVX2 VNNI", "AVX2"],
            #[cfg(target_arch = "aarch64")]
            () => &["NEON BF16 I8MM", "NEON DotProd", "NEON"],
            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            () => &[],
        };
        let supported: Vec<&str> = Self::supported().into_iter().map(Self::name).collect();
        all.iter().filter(|name| !supported.contains(name)).copied().collect()
    }

    /// The same instruction set, but with bf16 dot products computed in f32; `None` if it does not exist in this form.
    pub(super) fn without_bf16(self) -> Option<Self> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => avx512::Avx512::<false, true>::detect().map(Self::Avx512Vnni),
            _ => None,
        }
    }

    /// The name in logs.
    pub(super) fn name(self) -> &'static str {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(..) => "AMX, AVX-512 BF16 VNNI",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512TileTwin(_) => "tile twin, AVX-512 BF16 VNNI",
            Self::PortableTileTwin(_) => "tile twin, portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => "AVX-512 BF16 VNNI",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(_) => "AVX-512 VNNI",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Vnni(_) => "AVX2 VNNI",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "AVX2",
            #[cfg(target_arch = "aarch64")]
            Self::NeonBf16I8mm(_) => "NEON BF16 I8MM",
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot(_) => "NEON DotProd",
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => "NEON",
            Self::Portable(_) => "portable",
        }
    }

    /// Whether the path has an instruction for bf16 dot products. Otherwise they are computed with f32 instructions.
    pub(super) fn has_bf16(self) -> bool {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(..) => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => true,
            #[cfg(target_arch = "aarch64")]
            Self::NeonBf16I8mm(_) => true,
            _ => false,
        }
    }

    /// Whether the path multiplies bf16 and int8 in tiles.
    pub(super) fn has_tiles(self) -> bool {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(..) => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512TileTwin(_) => true,
            Self::PortableTileTwin(_) => true,
            _ => false,
        }
    }

    /// Runs `op` compiled for this path, with tile registers that are configured before and released after.
    ///
    /// # Panics
    /// The path has no tiles.
    pub(super) fn enter_tiles(self, op: impl TileOp) {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(isa, amx) => isa.enter(WithTiles { op, configure: || amx.configure() }),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512TileTwin(isa) => isa.enter(WithTiles { op, configure: TileTwin::new }),
            Self::PortableTileTwin(isa) => isa.enter(WithTiles { op, configure: TileTwin::new }),
            _ => unreachable!("the path has no tiles"),
        }
    }

    /// Columns of a panel of packed weights that are not in tiles.
    pub(super) fn panel_columns(self) -> usize {
        struct Panel;
        impl SimdOp for Panel {
            type Output = usize;
            fn run<I: Isa>(self, _: I) -> usize {
                I::PANEL_COLUMNS
            }
        }
        self.enter(Panel)
    }

    /// Runs `op` compiled for this path.
    pub(super) fn enter<O: SimdOp>(self, op: O) -> O::Output {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(isa, _) => isa.enter(op),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512TileTwin(isa) => isa.enter(op),
            Self::PortableTileTwin(isa) => isa.enter(op),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(isa) => isa.enter(op),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(isa) => isa.enter(op),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(isa) => isa.enter(op),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Vnni(isa) => isa.enter(op),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => isa.enter(op),
            #[cfg(target_arch = "aarch64")]
            Self::NeonBf16I8mm(isa) => isa.enter(op),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot(isa) => isa.enter(op),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(isa) => isa.enter(op),
            Self::Portable(isa) => isa.enter(op),
        }
    }
}
