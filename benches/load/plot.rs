//! Draws goodput and latency against offered load as an SVG, from the JSON lines of `load curve --json`.
//!
//! One line for each name in the files, of medians over the runs. Loads and goodput are multiples of that server's highest
//! goodput, which is measured in the same run.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use rerankd::cli::plot::{Axis, Chart, Point, Scale, Series, svg};
use serde::Deserialize;

use super::report::median;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Files that `load curve --json` has written
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// A line of `load curve --json`.
#[derive(Debug, Deserialize)]
struct Row {
    command: String,
    name: String,
    factor: f64,
    offered_per_s: f64,
    goodput_per_s: f64,
    /// Missing if no answer had status 200.
    p99_ms: Option<f64>,
}

/// Medians over the runs of one load.
struct Load {
    offered: f64,
    goodput: f64,
    p99_ms: Option<f64>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut rows: Vec<Row> = Vec::new();
    for file in &args.files {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        for line in text.lines() {
            rows.push(serde_json::from_str(line).with_context(|| format!("{}: {line}", file.display()))?);
        }
    }
    rows.retain(|row| row.command == "curve");
    ensure!(!rows.is_empty(), "there are no lines of `load curve` in these files");
    print!("{}", svg(&charts(&rows)));
    Ok(())
}

fn charts(rows: &[Row]) -> [Chart; 2] {
    let mut names: Vec<&str> = Vec::new();
    for row in rows {
        if !names.contains(&row.name.as_str()) {
            names.push(&row.name);
        }
    }
    let (mut goodput, mut latency) = (Vec::new(), Vec::new());
    for name in names {
        let loads = loads(&rows.iter().filter(|row| row.name == name).collect::<Vec<_>>());
        let peak = loads.iter().map(|load| load.goodput).fold(f64::MIN_POSITIVE, f64::max);
        let series = |y: &dyn Fn(&Load) -> f64| {
            let points = loads.iter().map(|load| Point { x: load.offered / peak, y: y(load), ..Point::default() });
            Series { name: name.to_owned(), points: points.collect(), line: true }
        };
        goodput.push(series(&|load| 100.0 * load.goodput / peak));
        latency.push(series(&|load| load.p99_ms.unwrap_or(f64::NAN)));
    }
    let x = || Axis { label: "offered load, multiples of the highest rate".to_owned(), scale: Scale::Log };
    [
        Chart {
            title: "Answers in time".to_owned(),
            x: x(),
            y: Axis { label: "% of the highest rate".to_owned(), scale: Scale::FromZero },
            series: goodput,
        },
        Chart {
            title: "p99 of answers with status 200".to_owned(),
            x: x(),
            y: Axis { label: "ms".to_owned(), scale: Scale::Log },
            series: latency,
        },
    ]
}

/// Medians of one server's runs, in order of the load.
fn loads(rows: &[&Row]) -> Vec<Load> {
    let mut factors: Vec<f64> = rows.iter().map(|row| row.factor).collect();
    factors.sort_by(f64::total_cmp);
    factors.dedup();
    let load = |&factor: &f64| {
        let of =
            |figure: fn(&Row) -> f64| median(rows.iter().filter(|row| row.factor == factor).map(|row| figure(row)));
        let p99: Vec<f64> = rows.iter().filter(|row| row.factor == factor).filter_map(|row| row.p99_ms).collect();
        Load {
            offered: of(|row| row.offered_per_s),
            goodput: of(|row| row.goodput_per_s),
            p99_ms: (!p99.is_empty()).then(|| median(p99)),
        }
    };
    factors.iter().map(load).collect()
}
