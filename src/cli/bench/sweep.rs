//! `rerankd bench --svg`: throughput against latency for requests of growing size.

use super::medians::{Median, medians, print_medians};
use super::workloads;
use crate::batch::Pair;
use crate::cli::failure::Failure;
use crate::cli::plot::{Axis, Chart, Point, Scale, Series};
use crate::loading::{DeviceChoice, LoadedModel};

/// Tokens of a pair: a short passage and a long one.
const LENGTHS: [usize; 2] = [128, 512];

/// Measures requests of 1, 2, 4 and more pairs, up to two batches of `batch_tokens`, and prints a table. Returns a curve for each
/// length of a pair.
///
/// # Errors
/// The backend's error for a batch; standard output cannot be written.
pub(super) fn run(model: &LoadedModel, runs: u32, batch_tokens: usize) -> Result<Vec<Series>, Failure> {
    let mut lengths = LENGTHS.map(|tokens| tokens.min(model.text.window())).to_vec();
    lengths.dedup();
    let mut curves = Vec::new();
    for tokens in lengths {
        let name = format!("{} with pairs of {tokens} tokens", model.name);
        let largest = (2 * batch_tokens / tokens).max(1);
        let pairs: Vec<Pair> = (0..largest).map(|_| workloads::pair(model, tokens)).collect();
        let sizes = (0..).map(|power| 1 << power).take_while(|&size| size <= largest);
        let requests: Vec<(&str, &[Pair])> = sizes.map(|size| (name.as_str(), &pairs[..size])).collect();
        let medians = medians(model, &requests, runs, batch_tokens)?;
        print_medians(&medians)?;
        let points = medians.iter().map(point).collect();
        curves.push(Series { name, points, line: true });
    }
    Ok(curves)
}

fn point(median: &Median) -> Point {
    Point {
        x: median.seconds * 1e3,
        y: median.tokens_per_second(),
        label: median.pairs.to_string(),
        ..Point::default()
    }
}

/// The picture of `curves`.
pub(super) fn chart(device: &DeviceChoice, curves: Vec<Series>) -> Chart {
    Chart {
        title: format!("Throughput against latency: {}, {}", device.place(), device.name()),
        x: Axis { label: "median time of a request, ms; the numbers are its pairs".to_owned(), scale: Scale::Log },
        y: Axis { label: "tokens per second".to_owned(), scale: Scale::FromZero },
        series: curves,
    }
}
