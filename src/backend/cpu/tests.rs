//! Compares every operation with candle or with its definition in f64, on every instruction set of this machine and at awkward
//! sizes. GEMMs and attention must also be bitwise equal on one thread and on all threads.

use candle_core::{Device, Tensor};

use super::activation;
use super::simd::{Accuracy, Isa, SimdOp};
use super::*;
use crate::backend::candle::CandleBackend;
use crate::batch::Pair;

/// Runs `check` on every path of this machine, in every precision. `golden::instruction_sets_that_this_machine_lacks_are_skips`
/// reports the others.
fn on_every_path(test: &str, check: impl Fn(&CpuBackend, &Tolerance)) {
    let pool = Arc::new(ThreadPool::new(2, false).unwrap());
    for path in SimdPath::supported().into_iter().chain([SimdPath::tile_twin()]) {
        for dtype in [CpuDtype::F32, CpuDtype::Bf16, CpuDtype::Int8] {
            let backend = CpuBackend::on(path, dtype, Arc::clone(&pool));
            check(&backend, &Tolerance { dtype, label: format!("{test}, {}, {dtype:?}", path.name()) });
        }
    }
}

/// How far results in a precision may be from the reference.
///
/// Operands here are exact in bf16. So a GEMM's error has two sources: sums in f32 in another order (some 1e-7 of the sum of
/// magnitudes), and rounding of the result (2^-9 of the value in bf16). int8 rounds an activation to within 1/510
/// of its row's range and a weight to within 1/254 of its column's largest magnitude; these errors add up like a random walk.
struct Tolerance {
    dtype: CpuDtype,
    /// Test, path and precision, for messages.
    label: String,
}

impl Tolerance {
    /// Each result is a sum of `terms` numbers of size `magnitude`.
    fn check(&self, ours: &[f32], theirs: &[f32], magnitude: f32, terms: usize, what: &str) {
        assert_eq!(ours.len(), theirs.len(), "{}: {what}", self.label);
        let sum = magnitude * (terms as f32).sqrt();
        let (relative, absolute) = match self.dtype {
            CpuDtype::F32 => (1e-6, 2e-6 * sum),
            CpuDtype::Bf16 => (1.0 / 250.0, 4e-6 * sum + magnitude / 400.0),
            CpuDtype::Int8 => (1.0 / 100.0, 0.025 * sum),
        };
        for (i, (our, their)) in ours.iter().zip(theirs).enumerate() {
            let tolerance = relative * their.abs() + absolute;
            assert!((our - their).abs() <= tolerance, "{}: {what}: value {i} is {our}, not {their}", self.label);
        }
    }
}

/// Random numbers between -1 and 1 that are exact in bf16.
pub(super) fn numbers(random: &mut fastrand::Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| half::bf16::from_f32(random.f32() * 2.0 - 1.0).to_f32()).collect()
}

pub(super) fn tensor(shape: &[usize], data: &[f32]) -> HostTensor {
    HostTensor { shape: shape.to_vec(), data: data.to_vec() }
}

fn candle(rows: usize, data: &[f32]) -> Tensor {
    Tensor::from_vec(data.to_vec(), (rows, data.len() / rows), &Device::Cpu).unwrap()
}

impl CpuBackend {
    /// A buffer as `layer_norm` returns it: f32 and quantized.
    pub(super) fn buffer(&self, rows: usize, data: &[f32]) -> Buffer {
        let columns = data.len() / rows;
        let mut f32_rows = Matrix::acquire(rows, columns);
        (0..rows).for_each(|row| f32_rows.row_mut(row).copy_from_slice(&data[row * columns..][..columns]));
        let mut quantized = QuantizedRows::acquire(self.format, self.layout(), rows, columns);
        if let Some(quantized) = &mut quantized {
            self.quantize(&ExecContext::single_thread(), QuantizeSource::F32(&f32_rows), columns, quantized, rows);
        }
        Buffer { rows, f32_rows: Some(f32_rows), quantized }
    }

    /// Queries, keys or values, as `apply` returns them: f32 or bf16.
    pub(super) fn attention_input(&self, rows: usize, data: &[f32]) -> Buffer {
        let buffer = CpuBackend {
            format: if self.format == StorageFormat::F32 { StorageFormat::F32 } else { StorageFormat::Bf16 },
            ..self.clone()
        }
        .buffer(rows, data);
        if self.format == StorageFormat::F32 { buffer } else { Buffer { f32_rows: None, ..buffer } }
    }

    /// Both kinds of execution context.
    pub(super) fn contexts(&self) -> [ExecContext; 2] {
        [ExecContext::single_thread(), ExecContext::all_threads(&self.pool)]
    }
}

/// The values of a buffer's quantized rows if it has them, otherwise of its f32 rows.
pub(super) fn values(buffer: &Buffer) -> Vec<f32> {
    match &buffer.quantized {
        None => (0..buffer.rows).flat_map(|row| buffer.f32_rows.as_ref().unwrap().row(row).to_vec()).collect(),
        Some(QuantizedRows::Bf16(rows)) => {
            (0..buffer.rows).flat_map(|row| rows.row(row).iter().map(|&b| half::bf16::from_bits(b).to_f32())).collect()
        }
        Some(QuantizedRows::Int8(rows, params)) => (0..buffer.rows)
            .flat_map(|row| {
                let params = params.row(0)[row];
                rows.row(row).iter().map(move |&byte| params.min + params.scale * f32::from(byte))
            })
            .collect(),
    }
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn gemms_match_the_reference() {
    on_every_path("gemms", |backend, tolerance| {
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
            // More than a block of k-groups in f32, in bf16 and in int8; and more than a block of rows.
            (7, 1030, 70),
            (3, 2100, 17),
            (2, 4100, 9),
            (390, 1030, 16),
            // In tiles: partial steps, blocks and panels; more than a slab of rows.
            (33, 96, 64),
            (70, 161, 40),
            (530, 40, 33),
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
                for kind in ["bias", "gelu", "gelu tanh", "relu", "silu", "residual", "head", "head tanh"] {
                    let what = format!("{m} x {k} x {n}, outputs {outputs:?}, {kind}");
                    let (ours_epilogue, theirs_epilogue) = match kind {
                        "gelu" => (Epilogue::Activation(Activation::Gelu), Epilogue::Activation(Activation::Gelu)),
                        "gelu tanh" => {
                            (Epilogue::Activation(Activation::GeluTanh), Epilogue::Activation(Activation::GeluTanh))
                        }
                        "relu" => (Epilogue::Activation(Activation::Relu), Epilogue::Activation(Activation::Relu)),
                        "silu" => (Epilogue::Activation(Activation::Silu), Epilogue::Activation(Activation::Silu)),
                        "head tanh" => (Epilogue::Activation(Activation::Tanh), Epilogue::Activation(Activation::Tanh)),
                        "residual" => (Epilogue::Residual(&residual_ours), Epilogue::Residual(&residual_theirs)),
                        _ => (Epilogue::Bias, Epilogue::Bias),
                    };
                    let weights = if kind.starts_with("head") { &exact } else { &ours };
                    let [single_thread, all_threads] = backend.contexts();
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
                                    Epilogue::Gated(_) => unreachable!("the layers here are not gated"),
                                },
                            )
                            .unwrap()
                    };
                    let result_single = values(&result(&single_thread));
                    assert_eq!(
                        bits(&result_single),
                        bits(&values(&result(&all_threads))),
                        "{}: {what}: one thread and all threads differ",
                        tolerance.label
                    );
                    let expected = reference.apply(&(), &theirs, outputs.clone(), &x_theirs, theirs_epilogue).unwrap();
                    let expected = reference.download(&(), &expected).unwrap();
                    let tolerance = if kind.starts_with("head") {
                        &Tolerance { dtype: CpuDtype::F32, label: tolerance.label.clone() }
                    } else {
                        tolerance
                    };
                    tolerance.check(&result_single, &expected, 1.0, k, &what);
                }
            }
        }
    });
}

/// Compares the bf16 approximation of GELU with the f32 one, which `gemms_match_the_reference` compares with candle.
#[test]
fn the_bf16_gelu_is_within_its_documented_error() {
    struct Both(f32);
    impl SimdOp for Both {
        type Output = [f32; 2];
        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> [f32; 2] {
            let of = |accuracy| {
                // All lanes are equal.
                let value = activation::activate(isa, Activation::Gelu, isa.splat(self.0), accuracy);
                isa.reduce_max(value)
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
fn layer_norms_match_the_definition() {
    on_every_path("norms", |backend, tolerance| {
        let mut random = fastrand::Rng::with_seed(8);
        for (rows, c) in [(1, 1), (2, 7), (3, 8), (1, 15), (5, 16), (2, 17), (3, 63), (2, 65), (7, 312), (2, 1024)] {
            // Rows far from zero, where a variance computed from sums of squares loses digits.
            let x: Vec<f32> = numbers(&mut random, rows * c).iter().map(|v| v + 30.0).collect();
            let (weight, bias) = (numbers(&mut random, c), numbers(&mut random, c));
            let weights = || NormWeights { weight: tensor(&[c], &weight), bias: tensor(&[c], &bias), eps: 1e-5 };
            // The definition, in f64. candle is no reference here: it computes the variance from sums of squares.
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
                // Near 30, the mean in f32 has an error of up to 2e-6; a number's difference from it is divided by the deviation.
                let exact = Tolerance { dtype: CpuDtype::F32, label: tolerance.label.clone() };
                exact.check(&backend.download(ctx, &ours).unwrap(), &theirs, 10.0, 1, &what);
                let exact = backend.download(ctx, &ours).unwrap();
                tolerance.check(&values(&ours), &exact, 2.0, 1, &format!("{what}, quantized"));
            }
        }
    });
}

#[test]
fn attention_matches_the_reference() {
    on_every_path("attention", |backend, tolerance| {
        let mut random = fastrand::Rng::with_seed(9);
        for (heads, d, lengths) in [
            (1, 1, &[1, 2, 3][..]),
            (2, 5, &[7, 1, 64]),
            (2, 8, &[63, 65, 2]),
            (3, 16, &[15, 16, 17]),
            (2, 32, &[1, 127, 128, 129]),
            (1, 64, &[511, 513, 24, 25]),
            (1, 80, &[33]),
            (2, 96, &[33, 47]),
            (1, 128, &[31, 300]),
            (1, 130, &[20, 1100]),
        ] {
            let shape = AttentionShape { heads, head_size: d };
            let c = heads * d;
            let pairs: Vec<Pair> = lengths.iter().map(|&n| Pair::new(vec![0; n], vec![0; n])).collect();
            let batch = Batch::pack(&pairs);
            let t = batch.tokens();
            // Large scores: the softmax must not overflow, and a few keys dominate it.
            let qkv: Vec<f32> = numbers(&mut random, t * 3 * c).iter().map(|v| v * 4.0).collect();
            let part = |from: usize, width: usize, rows: &[u32]| -> Vec<f32> {
                rows.iter().flat_map(|&row| qkv[row as usize * 3 * c + from..][..width].to_vec()).collect()
            };
            let all: Vec<u32> = (0..t as u32).collect();
            let (q, kv) = (part(0, c, &batch.cls_rows()), part(c, 2 * c, &all));
            for window in
                [None, Some(0), Some(64), Some(600)].into_iter().filter(|w| w.is_none_or(|w| w < 65 || t > 1000))
            {
                check_attention(backend, tolerance, (shape, window), &batch, [&qkv, &q, &kv]);
            }
        }
    });
}

fn check_attention(
    backend: &CpuBackend,
    tolerance: &Tolerance,
    (shape, window): (AttentionShape, Option<usize>),
    batch: &Batch,
    [qkv, q, kv]: [&[f32]; 3],
) {
    let (t, s) = (batch.tokens(), batch.sequences());
    let lengths: Vec<usize> = batch.ranges().map(|rows| rows.len()).collect();
    let what = format!("{shape:?}, {lengths:?}, window {window:?}");
    let reference = CandleBackend::cpu(2).unwrap();
    let theirs = reference.attention(&(), shape, window, &candle(t, qkv), batch).unwrap();
    let theirs_first = reference.cls_attention(&(), shape, window, &candle(s, q), &candle(t, kv), batch).unwrap();
    let [single_thread, all_threads] = backend.contexts();
    let ours = |ctx, batch: &Batch, [qkv, q, kv]: [&[f32]; 3]| {
        let (t, s) = (batch.tokens(), batch.sequences());
        let all = backend.attention(ctx, shape, window, &backend.attention_input(t, qkv), batch).unwrap();
        let (q, kv) = (backend.attention_input(s, q), backend.attention_input(t, kv));
        let first = backend.cls_attention(ctx, shape, window, &q, &kv, batch).unwrap();
        (values(&all), values(&first))
    };
    let (result, first) = ours(&single_thread, batch, [qkv, q, kv]);
    let (result_all, first_all) = ours(&all_threads, batch, [qkv, q, kv]);
    assert_eq!((bits(&result), bits(&first)), (bits(&result_all), bits(&first_all)), "{}: {what}", tolerance.label);
    // Results are weighted means of values up to 4; bf16 rounds the weights too. A weight is the exponential of a score, so the
    // absolute error of the score, which is a sum of d terms up to 16, is the weight's relative error in f32.
    let terms = if tolerance.dtype == CpuDtype::F32 { 16 * shape.head_size } else { 1 };
    tolerance.check(&result, &reference.download(&(), &theirs).unwrap(), 4.0, terms, &what);
    tolerance.check(&first, &reference.download(&(), &theirs_first).unwrap(), 4.0, terms, &format!("{what}, first"));
}

#[test]
fn gated_layers_match_the_reference() {
    on_every_path("gated", |backend, tolerance| {
        let mut random = fastrand::Rng::with_seed(12);
        let sizes =
            [(1, 1, 1), (2, 3, 5), (5, 4, 31), (6, 16, 32), (7, 63, 33), (13, 64, 100), (40, 130, 72), (7, 1030, 9)];
        for (m, k, f) in sizes {
            let (x, w) = (numbers(&mut random, m * k), numbers(&mut random, 2 * f * k));
            let b = numbers(&mut random, 2 * f);
            let reference = CandleBackend::cpu(2).unwrap();
            let load = |rows: usize| (tensor(&[rows, k], &w), tensor(&[rows], &b));
            let (weight, bias) = load(2 * f);
            let theirs = reference.linear(weight.clone(), bias.clone(), LayerRole::Gated).unwrap();
            let ours = backend.linear(weight, bias, LayerRole::Gated).unwrap();
            let (x_ours, x_theirs) = (backend.buffer(m, &x), candle(m, &x));
            for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu] {
                let what = format!("{m} x {k} x 2 * {f}, {activation:?}");
                let [single, all] = backend.contexts().map(|ctx| {
                    values(&backend.apply(&ctx, &ours, 0..2 * f, &x_ours, Epilogue::Gated(activation)).unwrap())
                });
                assert_eq!(bits(&single), bits(&all), "{}: {what}: one thread and all differ", tolerance.label);
                let expected = reference.apply(&(), &theirs, 0..2 * f, &x_theirs, Epilogue::Gated(activation)).unwrap();
                let expected = reference.download(&(), &expected).unwrap();
                // An error of the gate is multiplied by the value, and that of the value by the gate, both sums of k terms.
                let size = (k as f32).sqrt();
                tolerance.check(&single, &expected, size.max(1.0), k, &what);
            }
        }
    });
}

#[test]
fn rotations_match_the_reference() {
    on_every_path("rotary", |backend, tolerance| {
        let mut random = fastrand::Rng::with_seed(13);
        for (heads, d, lengths) in
            [(1, 2, &[1, 3][..]), (2, 8, &[5, 17]), (3, 20, &[9]), (2, 64, &[70, 1]), (1, 66, &[4])]
        {
            let pairs: Vec<Pair> = lengths.iter().map(|&n| Pair::new(vec![0; n], vec![0; n])).collect();
            let batch = Batch::pack(&pairs);
            let (t, columns) = (batch.tokens(), (heads + 1) * d);
            let x = numbers(&mut random, t * columns);
            let frequencies: Vec<f32> = (0..d / 2).map(|i| 100f32.powf(-2.0 * i as f32 / d as f32)).collect();
            let table = RotaryTable { frequencies, positions: 80 };
            let reference = CandleBackend::cpu(2).unwrap();
            let theirs = reference.rotary(table.clone()).unwrap();
            let theirs = reference.rotate(&(), &theirs, heads, candle(t, &x), &batch).unwrap();
            let theirs = reference.download(&(), &theirs).unwrap();
            let ours = backend.rotary(table).unwrap();
            for ctx in &backend.contexts() {
                let rotated = backend.rotate(ctx, &ours, heads, backend.attention_input(t, &x), &batch).unwrap();
                let rotated = values(&rotated);
                tolerance.check(&rotated, &theirs, 1.0, 2, &format!("{heads} heads of {d}, {lengths:?}"));
                // The last head is not rotated, and position 0 is the identity.
                for (row, (ours, x)) in rotated.chunks(columns).zip(x.chunks(columns)).enumerate() {
                    assert_eq!(ours[heads * d..], x[heads * d..], "{}: row {row}", tolerance.label);
                    assert!(batch.positions()[row] > 0 || ours == x, "{}: row {row}", tolerance.label);
                }
            }
        }
    });
}

#[test]
fn pre_norms_match_norms_in_place_and_keep_their_input() {
    on_every_path("pre-norms", |backend, tolerance| {
        let mut random = fastrand::Rng::with_seed(14);
        for (rows, c) in [(1, 1), (2, 7), (3, 16), (5, 65), (2, 312)] {
            let x = numbers(&mut random, rows * c);
            let (weight, bias) = (numbers(&mut random, c), numbers(&mut random, c));
            let norm = NormWeights { weight: tensor(&[c], &weight), bias: tensor(&[c], &bias), eps: 1e-5 };
            let norm = backend.norm(norm).unwrap();
            for ctx in &backend.contexts() {
                let kept = backend.buffer(rows, &x);
                let normed = backend.pre_norm(ctx, &norm, &kept).unwrap();
                let in_place = backend.layer_norm(ctx, &norm, backend.buffer(rows, &x)).unwrap();
                assert_eq!(bits(&values(&normed)), bits(&values(&in_place)), "{}: {rows} x {c}", tolerance.label);
                assert_eq!(backend.download(ctx, &kept).unwrap(), x, "{}: {rows} x {c}", tolerance.label);
            }
        }
    });
}

#[test]
fn means_of_rows_match_the_definition() {
    on_every_path("means", |backend, tolerance| {
        let mut random = fastrand::Rng::with_seed(15);
        let pairs = [3, 1, 64].map(|n| Pair::new(vec![0; n], vec![0; n]));
        let batch = Batch::pack(&pairs);
        let (t, c) = (batch.tokens(), 33);
        let x = numbers(&mut random, t * c);
        let mean = |rows: Range<usize>, column: usize| {
            rows.clone().map(|row| f64::from(x[row * c + column])).sum::<f64>() / rows.len() as f64
        };
        let theirs: Vec<f32> = batch
            .ranges()
            .flat_map(|rows| (0..c).map(move |column| (rows.clone(), column)))
            .map(|(rows, column)| mean(rows, column) as f32)
            .collect();
        for ctx in &backend.contexts() {
            let ours = backend.mean_rows(ctx, &backend.buffer(t, &x), &batch).unwrap();
            assert_eq!(backend.download(ctx, &ours).unwrap(), theirs, "{}", tolerance.label);
        }
    });
}

#[test]
fn embeddings_match_the_reference() {
    on_every_path("embeddings", |backend, tolerance| {
        let mut random = fastrand::Rng::with_seed(10);
        for c in [1, 8, 17, 312] {
            let (words, positions, types) =
                (numbers(&mut random, 50 * c), numbers(&mut random, 9 * c), numbers(&mut random, 2 * c));
            let tables = || EmbeddingTables {
                words: tensor(&[50, c], &words),
                positions: Some(tensor(&[9, c], &positions)),
                types: Some(tensor(&[2, c], &types)),
                norm: NormWeights { weight: tensor(&[c], &words[..c]), bias: tensor(&[c], &types[..c]), eps: 1e-5 },
            };
            let pairs = [Pair::new(vec![3, 49, 0, 7], vec![0, 0, 1, 1]), Pair::new(vec![5], vec![0])];
            let batch = Batch::pack(&pairs);
            let reference = CandleBackend::cpu(2).unwrap();
            let theirs = reference.embed(&(), &reference.embeddings(tables()).unwrap(), &batch).unwrap();
            let theirs = reference.download(&(), &theirs).unwrap();
            for ctx in &backend.contexts() {
                let ours = backend.embed(ctx, &backend.embeddings(tables()).unwrap(), &batch).unwrap();
                // bf16 and int8 backends store tables in f16. Numbers that are exact in bf16 are exact there too, down to 2^-17.
                let exact = Tolerance { dtype: CpuDtype::F32, label: tolerance.label.clone() };
                exact.check(&backend.download(ctx, &ours).unwrap(), &theirs, 60.0, 1, &format!("{c}"));
            }
        }
    });
}

#[test]
fn int8_dot_products_and_roundings_are_exact() {
    on_every_path("int8 and bf16", |backend, tolerance| backend.path.enter(ExactOps { label: &tolerance.label }));
}

struct ExactOps<'a> {
    label: &'a str,
}

impl SimdOp for ExactOps<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let mut random = fastrand::Rng::with_seed(11);
        for round in 0..2000 {
            // In every other round, only the extreme values, which would saturate an intermediate sum.
            let extremes = round % 2 == 0;
            let mut bytes = |low: i32, high: i32| -> Vec<i32> {
                let byte = |_| if extremes { [low, high][random.usize(..2)] } else { random.i32(low..=high) };
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
            assert_eq!(lanes, expected, "{}", self.label);

            // Multiples of 1/4, so that a quarter of the bytes are ties; and ties of bf16, of both signs.
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
            assert!(
                bytes.iter().zip(&whole).all(|(&byte, x)| f32::from(byte) == x.round_ties_even()),
                "{}",
                self.label
            );
            assert!(halves.iter().zip(&expected).all(|(&bits, x)| bits == x.to_bits()), "{}", self.label);
            assert!(as_f32.iter().zip(&expected).all(|(&x, half)| x == half.to_f32()), "{}", self.label);
        }
    }
}

/// In every precision a NaN must reach the result, so that the server reports an error.
#[test]
fn a_nan_in_a_row_reaches_the_result() {
    on_every_path("NaN", |backend, tolerance| {
        let c = 70;
        let mut x = vec![1.0; 2 * c];
        x[67] = f32::NAN;
        let norm = backend
            .norm(NormWeights { weight: tensor(&[c], &vec![1.0; c]), bias: tensor(&[c], &vec![0.0; c]), eps: 1e-5 })
            .unwrap();
        let ctx = ExecContext::single_thread();
        let normalized = backend.layer_norm(&ctx, &norm, backend.buffer(2, &x)).unwrap();
        let weights = backend
            .linear(tensor(&[c, c], &vec![0.1; c * c]), tensor(&[c], &vec![0.0; c]), LayerRole::Encoder)
            .unwrap();
        let added = backend.apply(&ctx, &weights, 0..c, &normalized, Epilogue::Residual(&normalized)).unwrap();
        let values = backend.download(&ctx, &backend.layer_norm(&ctx, &norm, added).unwrap()).unwrap();
        assert!(values[..c].iter().all(|value| value.is_nan()), "{}", tolerance.label);
    });
}
