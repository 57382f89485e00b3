//! Every operation on every instruction set that this machine has, at awkward sizes, against candle; and scores against
//! themselves, whatever the batch, its order and the number of threads.

use candle_core::{Device, Tensor};

use super::activation;
use super::simd::Accuracy;
use super::simd::{Isa, Op};
use super::*;
use crate::backend::candle::CandleBackend;
use crate::batch::Pair;

/// Runs `check` on every path here, in every precision. What does not run here is named.
fn everywhere(test: &str, check: impl Fn(&CpuBackend, &Bound)) {
    let paths = SimdPath::supported();
    let names: Vec<&str> = paths.iter().map(|path| path.name()).collect();
    eprintln!("{test}: on {}", names.join(", "));
    for missing in
        ["AVX-512 BF16 VNNI", "AVX-512 VNNI", "AVX-512", "AVX2 VNNI", "AVX2", "NEON BF16 I8MM", "NEON DotProd", "NEON"]
    {
        if !names.contains(&missing) {
            eprintln!("{test}: SKIPPED on {missing}, which this machine does not have");
        }
    }
    let pool = Arc::new(ThreadPool::new(2, false).unwrap());
    for path in paths {
        for dtype in [CpuDtype::F32, CpuDtype::Bf16, CpuDtype::Int8] {
            let backend = CpuBackend::on(path, dtype, Arc::clone(&pool));
            check(&backend, &Bound { dtype, at: format!("{test}, {}, {dtype:?}", path.name()) });
        }
    }
}

/// How far a precision's results may be from f32's.
///
/// Operands are exact in bf16 here, so what remains of a product is the order of f32 summation (some 1e-7 of the sum of
/// magnitudes) and the rounding of its result: 2^-9 of a bf16 value. int8 rounds each operand to within 1/254 of its row's
/// range or 1/127 of its column's largest, errors that add up like a random walk.
struct Bound {
    dtype: CpuDtype,
    at: String,
}

impl Bound {
    /// `magnitude` is the size of the numbers that were added up to each result, `terms` how many there were.
    fn check(&self, ours: &[f32], theirs: &[f32], magnitude: f32, terms: usize, what: &str) {
        assert_eq!(ours.len(), theirs.len(), "{}: {what}", self.at);
        let sum = magnitude * (terms as f32).sqrt();
        let (relative, absolute) = match self.dtype {
            CpuDtype::F32 => (1e-6, 2e-6 * sum),
            CpuDtype::Bf16 => (1.0 / 250.0, 4e-6 * sum + magnitude / 400.0),
            CpuDtype::Int8 => (1.0 / 100.0, 0.025 * sum),
        };
        for (i, (our, their)) in ours.iter().zip(theirs).enumerate() {
            let bound = relative * their.abs() + absolute;
            assert!((our - their).abs() <= bound, "{}: {what}: value {i} is {our}, not {their}", self.at);
        }
    }
}

/// Numbers between -1 and 1 that bf16 holds exactly.
fn numbers(random: &mut fastrand::Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| half::bf16::from_f32(random.f32() * 2.0 - 1.0).to_f32()).collect()
}

fn tensor(shape: &[usize], data: &[f32]) -> HostTensor {
    HostTensor { shape: shape.to_vec(), data: data.to_vec() }
}

fn candle(rows: usize, data: &[f32]) -> Tensor {
    Tensor::from_vec(data.to_vec(), (rows, data.len() / rows), &Device::Cpu).unwrap()
}

impl CpuBackend {
    /// Rows as a norm leaves them.
    fn buffer(&self, rows: usize, data: &[f32]) -> Buffer {
        let columns = data.len() / rows;
        let mut exact = Matrix::take(rows, columns);
        (0..rows).for_each(|row| exact.row_mut(row).copy_from_slice(&data[row * columns..][..columns]));
        let mut low = Low::take(self.format, rows, columns);
        if let Some(low) = &mut low {
            self.lower(&ExecContext { team: None }, LowerFrom::F32(&exact), columns, low, rows);
        }
        Buffer { rows, exact: Some(exact), low }
    }

    /// Queries, keys or values, as a product leaves them.
    fn attended(&self, rows: usize, data: &[f32]) -> Buffer {
        let buffer =
            CpuBackend { format: if self.format == Format::F32 { Format::F32 } else { Format::Bf16 }, ..self.clone() }
                .buffer(rows, data);
        if self.format == Format::F32 { buffer } else { Buffer { exact: None, ..buffer } }
    }

    /// Both kinds of ctx: alone, and all threads in step.
    fn contexts(&self) -> [ExecContext; 2] {
        [ExecContext { team: None }, ExecContext { team: Some(Arc::clone(&self.pool)) }]
    }
}

/// What a buffer's lower form stands for.
fn values(buffer: &Buffer) -> Vec<f32> {
    match &buffer.low {
        None => (0..buffer.rows).flat_map(|row| buffer.exact.as_ref().unwrap().row(row).to_vec()).collect(),
        Some(Low::Bf16(rows)) => {
            (0..buffer.rows).flat_map(|row| rows.row(row).iter().map(|&b| half::bf16::from_bits(b).to_f32())).collect()
        }
        Some(Low::Int8(rows, ranges)) => (0..buffer.rows)
            .flat_map(|row| {
                let range = ranges.row(0)[row];
                rows.row(row).iter().map(move |&byte| range.low + range.scale * f32::from(byte))
            })
            .collect(),
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn products_equal_their_definition() {
    everywhere("products", |backend, bound| {
        let mut random = fastrand::Rng::with_seed(7);
        let sizes = [
            (1, 1, 1),
            (2, 3, 5),
            (5, 4, 15),
            (6, 16, 16),
            (7, 63, 64),
            (13, 64, 65),
            (12, 65, 200),
            (31, 130, 33),
            // Beyond a block of k-steps in f32, in bf16 and in int8; and beyond a block of rows.
            (7, 1030, 70),
            (3, 2100, 17),
            (2, 4100, 9),
            (390, 1030, 16),
        ];
        for (m, k, n) in sizes {
            let (x, w, b) = (numbers(&mut random, m * k), numbers(&mut random, n * k), numbers(&mut random, n));
            let residual = numbers(&mut random, m * n);
            let reference = CandleBackend::cpu(2).unwrap();
            let theirs = reference.linear(tensor(&[n, k], &w), tensor(&[n], &b), LayerRole::Encoder).unwrap();
            let ours = backend.linear(tensor(&[n, k], &w), tensor(&[n], &b), LayerRole::Encoder).unwrap();
            let exact = backend.linear(tensor(&[n, k], &w), tensor(&[n], &b), LayerRole::Head).unwrap();
            let (x_ours, x_theirs) = (backend.buffer(m, &x), candle(m, &x));
            for outputs in [0..n, n / 3..n, 0..n.div_ceil(2), n / 3..n.div_ceil(2).max(n / 3 + 1)] {
                let columns = outputs.len();
                let residual = &residual[..m * columns];
                let (residual_ours, residual_theirs) = (backend.buffer(m, residual), candle(m, residual));
                for kind in ["bias", "gelu", "gelu tanh", "relu", "residual", "head", "head tanh"] {
                    let what = format!("{m} x {k} x {n}, outputs {outputs:?}, {kind}");
                    let (ours_epilogue, theirs_epilogue) = match kind {
                        "gelu" => (Epilogue::Activation(Activation::Gelu), Epilogue::Activation(Activation::Gelu)),
                        "gelu tanh" => {
                            (Epilogue::Activation(Activation::GeluTanh), Epilogue::Activation(Activation::GeluTanh))
                        }
                        "relu" => (Epilogue::Activation(Activation::Relu), Epilogue::Activation(Activation::Relu)),
                        "head tanh" => (Epilogue::Activation(Activation::Tanh), Epilogue::Activation(Activation::Tanh)),
                        "residual" => (Epilogue::Residual(&residual_ours), Epilogue::Residual(&residual_theirs)),
                        _ => (Epilogue::Bias, Epilogue::Bias),
                    };
                    let weights = if kind.starts_with("head") { &exact } else { &ours };
                    let [alone, team] = backend.contexts();
                    let result = |ctx| {
                        backend
                            .apply(
                                ctx,
                                weights,
                                outputs.clone(),
                                &x_ours,
                                match ours_epilogue {
                                    Epilogue::Bias => Epilogue::Bias,
                                    Epilogue::Activation(activation) => Epilogue::Activation(activation),
                                    Epilogue::Residual(residual) => Epilogue::Residual(residual),
                                },
                            )
                            .unwrap()
                    };
                    let result_alone = values(&result(&alone));
                    assert_eq!(
                        bits(&result_alone),
                        bits(&values(&result(&team))),
                        "{}: {what}: alone and in step",
                        bound.at
                    );
                    let expected = reference.apply(&(), &theirs, outputs.clone(), &x_theirs, theirs_epilogue).unwrap();
                    let expected = reference.download(&(), &expected).unwrap();
                    let bound = if kind.starts_with("head") {
                        &Bound { dtype: CpuDtype::F32, at: bound.at.clone() }
                    } else {
                        bound
                    };
                    bound.check(&result_alone, &expected, 1.0, k, &what);
                }
            }
        }
    });
}

/// The form of GELU that is rounded to bf16 next against the exact one, which the products' test holds to candle.
#[test]
fn the_shorter_gelu_is_as_near_as_it_says() {
    struct Both(f32);
    impl Op for Both {
        type Output = [f32; 2];
        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> [f32; 2] {
            let of = |accuracy| {
                // All lanes are alike.
                let value = activation::activate(isa, Activation::Gelu, isa.splat(self.0), accuracy);
                isa.max_of(value)
            };
            [of(Accuracy::F32), of(Accuracy::Bf16)]
        }
    }
    for path in SimdPath::supported() {
        eprintln!("gelu: {}", path.name());
        let extremes = [f32::MAX, f32::MIN_POSITIVE, 0.0];
        for x in (-40_000..40_000).map(|i| i as f32 / 2000.0).chain(extremes) {
            let [exact, short] = path.enter(Both(x));
            let (difference, size) = ((short - exact).abs(), exact.abs());
            assert!(difference <= 7.5e-5_f32.max(6.5e-4 * size), "{}: {short} for {exact} at {x}", path.name());
        }
    }
}

#[test]
fn norms_equal_their_definition() {
    everywhere("norms", |backend, bound| {
        let mut random = fastrand::Rng::with_seed(8);
        for (rows, c) in [(1, 1), (2, 7), (3, 8), (1, 15), (5, 16), (2, 17), (3, 63), (2, 65), (7, 312), (2, 1024)] {
            // Rows far from zero: the variance is taken about the mean.
            let x: Vec<f32> = numbers(&mut random, rows * c).iter().map(|v| v + 30.0).collect();
            let (weight, bias) = (numbers(&mut random, c), numbers(&mut random, c));
            let weights = || NormWeights { weight: tensor(&[c], &weight), bias: tensor(&[c], &bias), eps: 1e-5 };
            // In f64, by the definition: candle takes the variance from sums of squares, which loses it here.
            let theirs: Vec<f32> = x
                .chunks(c)
                .flat_map(|row| {
                    let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / c as f64;
                    let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / c as f64;
                    let normed = |(i, &v): (usize, &f32)| {
                        let normed = (f64::from(v) - mean) / (variance + f64::from(1e-5f32)).sqrt();
                        (normed * f64::from(weight[i]) + f64::from(bias[i])) as f32
                    };
                    row.iter().enumerate().map(normed).collect::<Vec<f32>>()
                })
                .collect();
            for ctx in &backend.contexts() {
                let ours =
                    backend.layer_norm(ctx, &backend.norm(weights()).unwrap(), backend.buffer(rows, &x)).unwrap();
                let what = format!("{rows} x {c}");
                // A number near 30 is known to within 2e-6, and so is the mean; what is left is divided by the deviation.
                let exact = Bound { dtype: CpuDtype::F32, at: bound.at.clone() };
                exact.check(&backend.download(ctx, &ours).unwrap(), &theirs, 10.0, 1, &what);
                let exact = backend.download(ctx, &ours).unwrap();
                bound.check(&values(&ours), &exact, 2.0, 1, &format!("{what}, lower form"));
            }
        }
    });
}

#[test]
fn attention_equals_its_definition() {
    everywhere("attention", |backend, bound| {
        let mut random = fastrand::Rng::with_seed(9);
        for (heads, d, lengths) in [
            (1, 1, &[1, 2, 3][..]),
            (2, 5, &[7, 1, 64]),
            (2, 8, &[63, 65, 2]),
            (3, 16, &[15, 16, 17]),
            (2, 32, &[1, 127, 128, 129]),
            (1, 64, &[511, 513, 24, 25]),
            (1, 80, &[33]),
            (1, 130, &[20, 1100]),
        ] {
            let shape = AttentionShape { heads, head_size: d };
            let c = heads * d;
            let pairs: Vec<Pair> = lengths.iter().map(|&n| Pair::new(vec![0; n], vec![0; n])).collect();
            let batch = Batch::pack(&pairs);
            let t = batch.tokens();
            // Large scores: the softmax must not overflow, and takes some keys almost alone.
            let qkv: Vec<f32> = numbers(&mut random, t * 3 * c).iter().map(|v| v * 4.0).collect();
            let part = |from: usize, width: usize, rows: &[u32]| -> Vec<f32> {
                rows.iter().flat_map(|&row| qkv[row as usize * 3 * c + from..][..width].to_vec()).collect()
            };
            let all: Vec<u32> = (0..t as u32).collect();
            let (q, kv) = (part(0, c, &batch.gather_cls()), part(c, 2 * c, &all));
            let reference = CandleBackend::cpu(2).unwrap();
            let theirs = reference.attention(&(), shape, &candle(t, &qkv), &batch).unwrap();
            let theirs_first =
                reference.cls_attention(&(), shape, &candle(batch.sequences(), &q), &candle(t, &kv), &batch).unwrap();
            let [alone, team] = backend.contexts();
            let what = format!("{heads} heads of {d}, {lengths:?}");
            let ours = |ctx| {
                let all = backend.attention(ctx, shape, &backend.attended(t, &qkv), &batch).unwrap();
                let first = backend
                    .cls_attention(
                        ctx,
                        shape,
                        &backend.attended(batch.sequences(), &q),
                        &backend.attended(t, &kv),
                        &batch,
                    )
                    .unwrap();
                (values(&all), values(&first))
            };
            let (result, first) = ours(&alone);
            let (result_team, first_team) = ours(&team);
            assert_eq!((bits(&result), bits(&first)), (bits(&result_team), bits(&first_team)), "{}: {what}", bound.at);
            // An average of values up to 4, with weights that bf16 rounds too. In f32 a score's own error, a sum of d terms up to
            // 16, is a relative error of its weight.
            let terms = if bound.dtype == CpuDtype::F32 { 16 * d } else { 1 };
            bound.check(&result, &reference.download(&(), &theirs).unwrap(), 4.0, terms, &what);
            bound.check(
                &first,
                &reference.download(&(), &theirs_first).unwrap(),
                4.0,
                terms,
                &format!("{what}, first"),
            );
        }
    });
}

#[test]
fn embeddings_equal_their_definition() {
    everywhere("embeddings", |backend, bound| {
        let mut random = fastrand::Rng::with_seed(10);
        for c in [1, 8, 17, 312] {
            let (words, positions, types) =
                (numbers(&mut random, 50 * c), numbers(&mut random, 9 * c), numbers(&mut random, 2 * c));
            let tables = || EmbeddingTables {
                words: tensor(&[50, c], &words),
                positions: tensor(&[9, c], &positions),
                types: tensor(&[2, c], &types),
                norm: NormWeights { weight: tensor(&[c], &words[..c]), bias: tensor(&[c], &types[..c]), eps: 1e-5 },
            };
            let pairs = [Pair::new(vec![3, 49, 0, 7], vec![0, 0, 1, 1]), Pair::new(vec![5], vec![0])];
            let batch = Batch::pack(&pairs);
            let reference = CandleBackend::cpu(2).unwrap();
            let theirs = reference.embed(&(), &reference.embeddings(tables()).unwrap(), &batch).unwrap();
            let theirs = reference.download(&(), &theirs).unwrap();
            for ctx in &backend.contexts() {
                let ours = backend.embed(ctx, &backend.embeddings(tables()).unwrap(), &batch).unwrap();
                // Numbers exact in bf16 are exact in f16 as well, down to 2^-17.
                let exact = Bound { dtype: CpuDtype::F32, at: bound.at.clone() };
                exact.check(&backend.download(ctx, &ours).unwrap(), &theirs, 60.0, 1, &format!("{c}"));
            }
        }
    });
}

/// What is exact of an instruction set: dot products of bytes, the largest ones among them, and the two roundings.
#[test]
fn bytes_and_halves_are_exact() {
    everywhere("bytes and halves", |backend, bound| backend.path.enter(BytesAndHalves { at: &bound.at }));
}

struct BytesAndHalves<'a> {
    at: &'a str,
}

impl Op for BytesAndHalves<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let mut random = fastrand::Rng::with_seed(11);
        for round in 0..2000 {
            // Every other round, nothing but the ends of the ranges: what saturates, saturates here.
            let ends = round % 2 == 0;
            let mut bytes = |low: i32, high: i32| -> Vec<i32> {
                let byte = |_| if ends { [low, high][random.usize(..2)] } else { random.i32(low..=high) };
                (0..4 * I::LANES).map(byte).collect()
            };
            let (a, b) = (bytes(0, 255), bytes(-127, 127));
            let words = |bytes: &[i32]| -> Vec<u32> {
                bytes.chunks(4).map(|four| u32::from_le_bytes(std::array::from_fn(|i| four[i] as u8))).collect()
            };
            let mut lanes = words(&bytes(0, 255));
            let offset = if I::SIGNED_BYTES { 128 } else { 0 };
            let expected: Vec<u32> = (0..I::LANES)
                .map(|i| {
                    let sum: i32 = (4 * i..4 * i + 4).map(|j| (a[j] - offset) * b[j]).sum();
                    lanes[i].wrapping_add_signed(sum)
                })
                .collect();
            let (a, b) = (words(&a), words(&b));
            // SAFETY: each has LANES words.
            unsafe {
                let acc = isa.load_bits(lanes.as_ptr());
                let sums = isa.dot_int8(acc, isa.load_bits(a.as_ptr()), isa.load_bits(b.as_ptr()));
                isa.store_bits(lanes.as_mut_ptr(), sums);
            }
            assert_eq!(lanes, expected, "{}", self.at);

            // Quarters, so that a quarter of the bytes are ties; and bf16's ties, on both sides.
            let whole: Vec<f32> = (0..I::LANES).map(|_| random.u32(0..=4 * 255) as f32 / 4.0).collect();
            let float = |_| f32::from_bits(random.u32(1 << 23..0x7f00_0000) & !0x7fff | random.u32(0..2) << 31);
            let floats: Vec<f32> = (0..I::LANES).map(float).collect();
            let (mut bytes, mut halves) = (vec![0u8; I::LANES], vec![0u16; I::LANES]);
            let mut as_f32 = vec![0f32; I::LANES];
            // SAFETY: each has LANES values.
            unsafe {
                isa.store_u8(bytes.as_mut_ptr(), isa.load(whole.as_ptr()));
                isa.store_bf16(halves.as_mut_ptr(), isa.load(floats.as_ptr()));
                isa.store(as_f32.as_mut_ptr(), isa.load_bf16(halves.as_ptr()));
            }
            let expected: Vec<half::bf16> = floats.iter().map(|&x| half::bf16::from_f32(x)).collect();
            assert!(bytes.iter().zip(&whole).all(|(&byte, x)| f32::from(byte) == x.round_ties_even()), "{}", self.at);
            assert!(halves.iter().zip(&expected).all(|(&bits, x)| bits == x.to_bits()), "{}", self.at);
            assert!(as_f32.iter().zip(&expected).all(|(&x, half)| x == half.to_f32()), "{}", self.at);
        }
    }
}

/// A number that is no number anywhere in a row reaches the result, in every precision: the server answers an error.
#[test]
fn nan_is_not_lost() {
    everywhere("NaN", |backend, bound| {
        let c = 70;
        let mut x = vec![1.0; 2 * c];
        x[67] = f32::NAN;
        let norm = backend
            .norm(NormWeights { weight: tensor(&[c], &vec![1.0; c]), bias: tensor(&[c], &vec![0.0; c]), eps: 1e-5 })
            .unwrap();
        let ctx = ExecContext { team: None };
        let normed = backend.layer_norm(&ctx, &norm, backend.buffer(2, &x)).unwrap();
        let weights = backend
            .linear(tensor(&[c, c], &vec![0.1; c * c]), tensor(&[c], &vec![0.0; c]), LayerRole::Encoder)
            .unwrap();
        let added = backend.apply(&ctx, &weights, 0..c, &normed, Epilogue::Residual(&normed)).unwrap();
        let values = backend.download(&ctx, &backend.layer_norm(&ctx, &norm, added).unwrap()).unwrap();
        assert!(values[..c].iter().all(|value| value.is_nan()), "{}", bound.at);
    });
}
