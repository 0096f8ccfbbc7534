//! Line plots as SVG, over a logarithmic horizontal axis.

use std::fmt::Write as _;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;
const MARGIN: f64 = 64.0;
const COLOURS: [&str; 4] = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd"];

/// A plot with several lines.
pub(crate) struct Plot {
    pub(crate) title: &'static str,
    pub(crate) across: &'static str,
    pub(crate) up: &'static str,
    /// Whether the vertical axis is logarithmic. The horizontal axis always is.
    pub(crate) is_logarithmic: bool,
    pub(crate) lines: Vec<Line>,
}

/// Points from left to right.
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Maps a range of numbers to a range of pixels.
struct Axis {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
    is_logarithmic: bool,
}

impl Axis {
    fn place(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.is_logarithmic { value.max(1e-9).log10() } else { value };
        let part = (scale(value) - scale(self.from)) / (scale(self.to) - scale(self.from)).max(1e-9);
        self.start + part * (self.end - self.start)
    }

    /// The values of the grid lines.
    fn marks(&self) -> Vec<f64> {
        if self.is_logarithmic {
            let (from, to) = (self.from.log10().floor() as i32, self.to.log10().ceil() as i32);
            let marks = (from..=to).flat_map(|tens| [1.0, 2.0, 5.0].map(|n| n * 10f64.powi(tens)));
            return marks.filter(|mark| *mark >= self.from * 0.99 && *mark <= self.to * 1.01).collect();
        }
        let rough = (self.to / 5.0).max(1e-9);
        let tens = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * tens).find(|step| *step >= rough).unwrap_or(rough);
        (0..=5).map(|n| f64::from(n) * step).filter(|mark| *mark <= self.to).collect()
    }
}

fn short(value: f64) -> String {
    if value >= 1e3 { format!("{}k", value / 1e3) } else { format!("{value}") }
}

impl Plot {
    /// The SVG file.
    pub(crate) fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let least = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::INFINITY, f64::min);
        let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
        let across = Axis {
            from: least(&mut points().map(|point| point.0)),
            to: most(&mut points().map(|point| point.0)),
            start: MARGIN,
            end: WIDTH - MARGIN / 2.0,
            is_logarithmic: true,
        };
        let from = if self.is_logarithmic { least(&mut points().map(|point| point.1)) * 0.8 } else { 0.0 };
        let up = Axis {
            from,
            to: most(&mut points().map(|point| point.1)) * 1.1,
            start: HEIGHT - MARGIN,
            end: MARGIN / 2.0,
            is_logarithmic: self.is_logarithmic,
        };
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">
<rect width=\"100%\" height=\"100%\" fill=\"white\"/>
<text x=\"{MARGIN}\" y=\"20\" font-size=\"14\">{}</text>\n",
            self.title
        );
        let mut add = |element: String| svg.push_str(&(element + "\n"));
        let (left, right, bottom, top) = (across.start, across.end, up.start, up.end);
        for mark in across.marks() {
            let x = across.place(mark);
            add(format!("<line x1=\"{x:.1}\" y1=\"{bottom}\" x2=\"{x:.1}\" y2=\"{top}\" stroke=\"#ddd\"/>"));
            add(format!("<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>", bottom + 16.0, short(mark)));
        }
        for mark in up.marks() {
            let y = up.place(mark);
            add(format!("<line x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>"));
            add(format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>", left - 6.0, y + 4.0, short(mark)));
        }
        let middle = (left + right) / 2.0;
        add(format!("<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>", bottom + 36.0, self.across));
        let middle = (top + bottom) / 2.0;
        add(format!(
            "<text x=\"16\" y=\"{middle}\" text-anchor=\"middle\" transform=\"rotate(-90 16 {middle})\">{}</text>",
            self.up
        ));
        for (n, (line, colour)) in self.lines.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let mut way = String::new();
            for (x, y) in &line.points {
                let (x, y) = (across.place(*x), up.place(*y));
                write!(way, "{x:.1},{y:.1} ").expect("writing to a string");
                add(format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"));
            }
            add(format!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                way.trim_end()
            ));
            let y = top + 16.0 * n as f64 + 12.0;
            add(format!("<text x=\"{}\" y=\"{y}\" fill=\"{colour}\">{}</text>", left + 12.0, line.name));
        }
        svg + "</svg>\n"
    }
}
