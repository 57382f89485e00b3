//! Charts as SVG: lines or points, with linear or logarithmic axes. The colors follow the reader's light or dark theme.

use std::fmt::Write as _;

/// A chart. Its points are in data coordinates; points that are not finite, or not positive on a logarithmic axis, are left out.
#[derive(Debug, Clone)]
pub struct Chart {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
}

/// An axis of a chart. Its range is that of the points.
#[derive(Debug, Clone)]
pub struct Axis {
    /// What the axis shows, with the unit.
    pub label: String,
    pub scale: Scale,
}

/// How values are placed along an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    Linear,
    /// Linear, with a range that starts at 0.
    FromZero,
    Log,
}

/// Points of one color, joined by a line or not.
#[derive(Debug, Clone)]
pub struct Series {
    /// The name in the legend; an empty one is not shown. In several charts, series at the same position must have the same name.
    pub name: String,
    pub points: Vec<Point>,
    pub line: bool,
}

/// A point of a series.
#[derive(Debug, Clone, Default)]
pub struct Point {
    pub x: f64,
    pub y: f64,
    /// Ends of a vertical bar through the point.
    pub interval: Option<(f64, f64)>,
    /// Text beside the point; may be empty.
    pub label: String,
}

/// Colors of the series. After the last color they begin again, with other dashes.
const COLORS: [&str; 6] = ["#2f81f7", "#d29922", "#3fb950", "#db61a2", "#a371f7", "#f85149"];
const DASHES: [&str; 3] = ["none", "7 4", "2 4"];
const STYLE: &str = "\
text { font: 13px sans-serif; fill: #1f2328 }
.title { font-weight: bold }
.axis { stroke: #59636e; fill: none }
.grid { stroke: #59636e; stroke-opacity: 0.25 }
.line { fill: none; stroke-width: 2.5 }
.bar { stroke-width: 1.5; stroke-opacity: 0.7 }
@media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .axis, .grid { stroke: #9198a1 } }
";

/// Size of the part between the axes: of a single chart, and of one of several.
const SINGLE: (f64, f64) = (620.0, 330.0);
const ONE_OF_SEVERAL: (f64, f64) = (370.0, 250.0);
/// Space around that part.
const LEFT: f64 = 72.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 56.0;
/// Height of a line of the legend, and estimated width of a character.
const LEGEND_LINE: f64 = 22.0;
const CHARACTER: f64 = 7.2;

/// Draws the charts side by side, with one legend below them.
pub fn svg(charts: &[Chart]) -> String {
    let (width, height) = if charts.len() == 1 { SINGLE } else { ONE_OF_SEVERAL };
    let chart_width = LEFT + width + RIGHT;
    let total_width = chart_width * charts.len().max(1) as f64;
    let legend = charts.first().map(|chart| Legend::of(chart, total_width));
    let total_height = TOP + height + BOTTOM + legend.as_ref().map_or(0.0, Legend::height);
    let mut svg = format!("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {total_width} {total_height}\">\n");
    let titles: Vec<&str> = charts.iter().map(|chart| chart.title.as_str()).collect();
    svg += &format!("<title>{}</title>\n<style>\n{STYLE}</style>\n", escape(&titles.join("; ")));
    for (i, chart) in charts.iter().enumerate() {
        let area = Area { left: i as f64 * chart_width + LEFT, top: TOP, width, height };
        Drawing::new(chart, area).draw(&mut svg);
    }
    if let Some(legend) = legend {
        legend.draw(TOP + height + BOTTOM + 12.0, &mut svg);
    }
    svg + "</svg>\n"
}

/// A rectangle in pixels; y grows downwards.
#[derive(Debug, Clone, Copy)]
struct Area {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

impl Area {
    fn overlaps(&self, other: &Self) -> bool {
        self.left < other.left + other.width
            && other.left < self.left + self.width
            && self.top < other.top + other.height
            && other.top < self.top + self.height
    }
}

/// A chart and its place in the picture.
struct Drawing<'a> {
    chart: &'a Chart,
    area: Area,
    x: Range,
    y: Range,
}

impl<'a> Drawing<'a> {
    fn new(chart: &'a Chart, area: Area) -> Self {
        let points = || chart.series.iter().flat_map(|series| &series.points);
        let x = Range::of(points().map(|point| point.x), chart.x.scale);
        let ys = points().flat_map(|point| {
            let (low, high) = point.interval.unwrap_or((point.y, point.y));
            [point.y, low, high]
        });
        Self { chart, area, x, y: Range::of(ys, chart.y.scale) }
    }

    fn at_x(&self, x: f64) -> f64 {
        self.area.left + self.x.fraction(x) * self.area.width
    }

    fn at_y(&self, y: f64) -> f64 {
        self.area.top + (1.0 - self.y.fraction(y)) * self.area.height
    }

    fn draw(&self, svg: &mut String) {
        self.draw_axes(svg);
        let mut taken: Vec<Area> = self.chart.series.iter().flat_map(|series| self.marks(series)).collect();
        for (i, series) in self.chart.series.iter().enumerate() {
            self.draw_series(i, series, svg);
        }
        for series in &self.chart.series {
            for point in self.visible(series).filter(|point| !point.label.is_empty()) {
                self.draw_label(point, series.line, &mut taken, svg);
            }
        }
    }

    /// The places of a series' points, intervals and lines, which labels avoid. A line is a row of squares.
    fn marks(&self, series: &Series) -> Vec<Area> {
        const STEP: f64 = 4.0;
        let square = |(x, y): (f64, f64), half: f64| Area {
            left: x - half,
            top: y - half,
            width: 2.0 * half,
            height: 2.0 * half,
        };
        let points: Vec<(f64, f64)> =
            self.visible(series).map(|point| (self.at_x(point.x), self.at_y(point.y))).collect();
        let mut marks: Vec<Area> = points.iter().map(|&point| square(point, 5.0)).collect();
        for point in self.visible(series) {
            if let Some((low, high)) = point.interval {
                let (bottom, top) = (self.at_y(low), self.at_y(high));
                marks.push(Area { left: self.at_x(point.x) - 4.0, top, width: 8.0, height: bottom - top });
            }
        }
        if series.line {
            for ends in points.windows(2) {
                let ((x, y), (dx, dy)) = (ends[0], (ends[1].0 - ends[0].0, ends[1].1 - ends[0].1));
                let steps = (dx.hypot(dy) / STEP).ceil().max(1.0);
                marks.extend((0..steps as usize).map(|i| {
                    let share = i as f64 / steps;
                    square((x + share * dx, y + share * dy), STEP / 2.0)
                }));
            }
        }
        marks
    }

    fn visible<'b>(&'b self, series: &'b Series) -> impl Iterator<Item = &'b Point> {
        series.points.iter().filter(|point| self.x.shows(point.x) && self.y.shows(point.y))
    }

    fn draw_axes(&self, svg: &mut String) {
        let Area { left, top, width, height } = self.area;
        let (right, bottom) = (left + width, top + height);
        text(svg, "title", left, top - 20.0, "start", &self.chart.title);
        for y in self.y.ticks(6) {
            let at = self.at_y(y);
            writeln!(svg, r#"<line class="grid" x1="{left}" x2="{right}" y1="{at:.1}" y2="{at:.1}"/>"#).ok();
            text(svg, "", left - 7.0, at + 4.0, "end", &number(y));
        }
        for x in self.x.ticks(8) {
            let (at, end) = (self.at_x(x), bottom + 5.0);
            writeln!(svg, r#"<line class="axis" x1="{at:.1}" x2="{at:.1}" y1="{bottom}" y2="{end}"/>"#).ok();
            text(svg, "", at, bottom + 20.0, "middle", &number(x));
        }
        writeln!(svg, r#"<path class="axis" d="M{left} {top}V{bottom}H{right}"/>"#).ok();
        text(svg, "", left + width / 2.0, bottom + 42.0, "middle", &self.chart.x.label);
        text(svg, "", left, top - 4.0, "start", &self.chart.y.label);
    }

    fn draw_series(&self, index: usize, series: &Series, svg: &mut String) {
        let (color, dash) = look(index);
        if series.line {
            let path: Vec<String> = self
                .visible(series)
                .map(|point| format!("{:.1} {:.1}", self.at_x(point.x), self.at_y(point.y)))
                .collect();
            if path.len() > 1 {
                let path = path.join("L");
                writeln!(svg, r#"<path class="line" stroke="{color}" stroke-dasharray="{dash}" d="M{path}"/>"#).ok();
            }
        }
        for point in self.visible(series) {
            let (x, y) = (self.at_x(point.x), self.at_y(point.y));
            if let Some((low, high)) = point.interval {
                let (low, high) = (self.at_y(low), self.at_y(high));
                writeln!(
                    svg,
                    r#"<path class="bar" stroke="{color}" d="M{x:.1} {low:.1}V{high:.1}m-4 0h8M{:.1} {low:.1}h8"/>"#,
                    x - 4.0
                )
                .ok();
            }
            let name = if series.name.is_empty() { &point.label } else { &series.name };
            let tip = escape(&format!("{name}: {}, {}", number(point.x), number(point.y)));
            writeln!(svg, r#"<circle fill="{color}" cx="{x:.1}" cy="{y:.1}" r="4"><title>{tip}</title></circle>"#).ok();
        }
    }

    /// Writes a point's label beside it, at the first place where it covers nothing else and stays in the area. On a line the
    /// places above and below come first.
    fn draw_label(&self, point: &Point, on_line: bool, taken: &mut Vec<Area>, svg: &mut String) {
        let (x, y) = (self.at_x(point.x), self.at_y(point.y));
        let width = point.label.chars().count() as f64 * CHARACTER;
        let (right, left, center) = (x + 9.0, x - width - 9.0, x - width / 2.0);
        let (above, below, middle) = (y - 22.0, y + 6.0, y - 8.0);
        let beside = [(right, middle), (left, middle)];
        let upright = [(center, above), (center, below)];
        let corners = [(right, above), (left, above), (right, below), (left, below)];
        let places = if on_line { [upright, beside] } else { [beside, upright] };
        let places = places.concat().into_iter().chain(corners);
        let rectangles: Vec<Area> = places.map(|(left, top)| Area { left, top, width, height: 16.0 }).collect();
        let fits = |area: &&Area| {
            area.left >= self.area.left
                && area.left + width <= self.area.left + self.area.width + RIGHT
                && area.top + area.height <= self.area.top + self.area.height
                && !taken.iter().any(|other| area.overlaps(other))
        };
        let place = *rectangles.iter().find(fits).unwrap_or(&rectangles[0]);
        text(svg, "", place.left, place.top + 12.0, "start", &point.label);
        taken.push(place);
    }
}

/// The values that an axis shows.
#[derive(Debug, Clone, Copy)]
struct Range {
    /// On a logarithmic axis the logarithms.
    low: f64,
    high: f64,
    log: bool,
}

impl Range {
    /// The range of `values`, somewhat enlarged.
    fn of(values: impl Iterator<Item = f64>, scale: Scale) -> Self {
        let log = scale == Scale::Log;
        let usable = values.filter(|&value| value.is_finite() && !(log && value <= 0.0));
        let (low, high) = usable
            .map(|value| if log { value.log10() } else { value })
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = match low <= high {
            false => (0.0, 1.0),
            true => (if scale == Scale::FromZero { low.min(0.0) } else { low }, high),
        };
        let span = if high > low { high - low } else { high.abs().max(1.0) * 0.5 };
        let below = if scale == Scale::FromZero && low == 0.0 { 0.0 } else { 0.06 * span };
        Self { low: low - below, high: high + 0.08 * span, log }
    }

    fn shows(&self, value: f64) -> bool {
        value.is_finite() && !(self.log && value <= 0.0)
    }

    /// Where `value` is between the ends of the axis.
    fn fraction(&self, value: f64) -> f64 {
        let value = if self.log { value.log10() } else { value };
        ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }

    /// Round numbers in the range, about `wanted` of them.
    fn ticks(&self, wanted: usize) -> Vec<f64> {
        if !self.log {
            let step = round_step((self.high - self.low) / wanted as f64);
            let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
            return (first..=last).map(|i| i as f64 * step).collect();
        }
        let digits: &[f64] = if self.high - self.low < wanted as f64 / 3.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let decades = self.low.floor() as i32..=self.high.ceil() as i32;
        decades
            .flat_map(|decade| digits.iter().map(move |digit| digit * 10f64.powi(decade)))
            .filter(|tick| (self.low..=self.high).contains(&tick.log10()))
            .collect()
    }
}

/// The smallest of 1, 2 and 5 times a power of ten that is at least `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let digit = [1.0, 2.0, 5.0].into_iter().find(|digit| digit * power >= step * 0.999).unwrap_or(10.0);
    digit * power
}

/// `1,000`, `0.05`: at most four significant digits below 1000.
fn number(value: f64) -> String {
    if value.abs() >= 999.5 {
        let digits = format!("{:.0}", value.abs());
        let groups: Vec<&str> =
            digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
        return format!("{}{}", if value < 0.0 { "-" } else { "" }, groups.join(","));
    }
    let decimals = if value == 0.0 { 0 } else { (3 - value.abs().log10().floor() as i32).clamp(0, 9) as usize };
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// The names of a chart's series in their colors, in columns.
struct Legend<'a> {
    entries: Vec<(usize, &'a Series)>,
    columns: usize,
    column_width: f64,
}

impl<'a> Legend<'a> {
    fn of(chart: &'a Chart, width: f64) -> Self {
        let entries: Vec<_> = chart.series.iter().enumerate().filter(|(_, series)| !series.name.is_empty()).collect();
        let longest = entries.iter().map(|(_, series)| series.name.chars().count()).max().unwrap_or(0);
        let column_width = 60.0 + longest as f64 * CHARACTER;
        Self { entries, columns: ((width - LEFT) / column_width).floor().max(1.0) as usize, column_width }
    }

    fn height(&self) -> f64 {
        if self.entries.is_empty() {
            0.0
        } else {
            12.0 + self.entries.len().div_ceil(self.columns) as f64 * LEGEND_LINE
        }
    }

    fn draw(&self, top: f64, svg: &mut String) {
        for (place, (index, series)) in self.entries.iter().enumerate() {
            let x = LEFT + (place % self.columns) as f64 * self.column_width;
            let y = top + (place / self.columns) as f64 * LEGEND_LINE;
            let (color, dash) = look(*index);
            if series.line {
                let end = x + 28.0;
                writeln!(
                    svg,
                    r#"<line class="line" stroke="{color}" stroke-dasharray="{dash}" x1="{x}" x2="{end}" y1="{y}" y2="{y}"/>"#
                )
                .ok();
            } else {
                writeln!(svg, r#"<circle fill="{color}" cx="{}" cy="{y}" r="4"/>"#, x + 14.0).ok();
            }
            text(svg, "", x + 36.0, y + 4.0, "start", &series.name);
        }
    }
}

/// Color and dashes of the series at `index`.
fn look(index: usize) -> (&'static str, &'static str) {
    (COLORS[index % COLORS.len()], DASHES[index / COLORS.len() % DASHES.len()])
}

fn text(svg: &mut String, class: &str, x: f64, y: f64, anchor: &str, text: &str) {
    let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
    writeln!(svg, r#"<text{class} x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escape(text)).ok();
}

/// Text as XML: markup characters are escaped, control characters removed.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            c if c.is_control() => {}
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(scale: Scale, values: &[(f64, f64)]) -> Chart {
        let axis = |label: &str| Axis { label: label.to_owned(), scale };
        let points = values.iter().map(|&(x, y)| Point { x, y, label: "p".to_owned(), ..Point::default() }).collect();
        let series = vec![Series { name: "<a & b>".to_owned(), points, line: true }];
        Chart { title: "title".to_owned(), x: axis("x"), y: axis("y"), series }
    }

    #[test]
    fn every_usable_point_is_drawn_once_and_inside_the_picture() {
        let values = [(1.0, 10.0), (2.0, f64::NAN), (3.0, 0.0), (1e6, 1e-3)];
        for (scale, drawn) in [(Scale::Linear, 3), (Scale::FromZero, 3), (Scale::Log, 2)] {
            let svg = svg(&[chart(scale, &values)]);
            assert_eq!(svg.matches("<circle").count(), drawn, "{scale:?}: {svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(svg.contains("&lt;a &amp; b&gt;") && !svg.contains("<a"), "{svg}");
        }
    }

    #[test]
    fn labels_cover_no_point_line_or_interval() {
        let mut chart = chart(Scale::Linear, &[(0.0, 0.0), (1.0, 5.0), (2.0, 4.0), (3.0, 4.0), (4.0, 0.0)]);
        chart.series[0].points[3].interval = Some((3.0, 5.0));
        let drawing = Drawing::new(&chart, Area { left: LEFT, top: TOP, width: 620.0, height: 330.0 });
        let marks = drawing.marks(&chart.series[0]);
        assert!(marks.len() > 100, "lines are marked too");
        let mut taken = marks.clone();
        for point in &chart.series[0].points {
            drawing.draw_label(point, true, &mut taken, &mut String::new());
        }
        assert_eq!(taken.len(), marks.len() + 5);
        for label in &taken[marks.len()..] {
            assert!(!marks.iter().any(|mark| mark.overlaps(label)), "{label:?}");
        }
    }

    #[test]
    fn charts_without_points_or_range_have_axes() {
        for values in [&[][..], &[(5.0, 5.0)], &[(0.0, 0.0)], &[(f64::INFINITY, -1.0)]] {
            for scale in [Scale::Linear, Scale::FromZero, Scale::Log] {
                let chart = chart(scale, values);
                let svg = svg(&[chart.clone(), chart]);
                assert!(svg.matches("<text").count() > 4 && !svg.contains("NaN"), "{values:?} {scale:?}: {svg}");
            }
        }
    }

    #[test]
    fn ticks_are_round_numbers_within_the_range() {
        let ticks = |low, high, log| Range { low, high, log }.ticks(6).into_iter().map(number).collect::<Vec<_>>();
        assert_eq!(ticks(0.0, 5100.0, false), ["0", "1,000", "2,000", "3,000", "4,000", "5,000"]);
        assert_eq!(ticks(0.912, 0.998, false), ["0.92", "0.94", "0.96", "0.98"]);
        assert_eq!(ticks(0.0, 1.5, true), ["1", "2", "5", "10", "20"]);
        assert_eq!(ticks(-2.0, 3.1, true), ["0.01", "0.1", "1", "10", "100", "1,000"]);
    }

    #[test]
    fn numbers_have_few_digits() {
        for (value, text) in [(0.0, "0"), (1234567.8, "1,234,568"), (0.052, "0.052"), (12.5, "12.5"), (999.9, "1,000")]
        {
            assert_eq!(number(value), text);
        }
    }
}
