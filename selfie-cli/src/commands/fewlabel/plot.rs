//! `plot.svg`: accuracies of every run with mean ± standard deviation, and gains with their intervals.

use std::fmt::Write as _;

use super::table::{Row, Table};
use crate::statistics::Interval;
use crate::svg::{COLOURS, escaped};

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Of a panel, in the picture's units. A budget takes this much of its width.
const BUDGET: f64 = 110.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 56.0;

/// A panel: what its axis shows, and where it stands.
struct Panel {
    left: f64,
    width: f64,
    low: f64,
    high: f64,
    step: f64,
}

impl Panel {
    /// With an axis that has all `values` on it, in steps that read well.
    fn new(left: f64, width: f64, values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let rough = ((high - low) / 5.0).max(0.02);
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|part| part * power).into_iter().find(|step| *step >= rough);
        let step = step.unwrap_or(rough);
        Self { left, width, low: (low / step).floor() * step, high: (high / step).ceil() * step, step }
    }

    fn y(&self, value: f64) -> f64 {
        TOP + HEIGHT * (self.high - value) / (self.high - self.low).max(self.step)
    }

    /// Lines, numbers and the title.
    fn frame(&self, title: &str, svg: &mut String) {
        let (left, right) = (self.left, self.left + self.width);
        writeln!(svg, r##"<text x="{left:.1}" y="{:.1}" font-weight="bold">{}</text>"##, TOP - 16.0, escaped(title))
            .expect(INFALLIBLE);
        let lines = ((self.high - self.low) / self.step).round() as i64;
        let digits = (-self.step.log10().floor()).max(0.0) as usize;
        for line in 0..=lines.max(1) {
            let value = self.low + line as f64 * self.step;
            let (y, text) = (self.y(value), format!("{value:.digits$}"));
            // Minus zero is zero.
            let text = if text.trim_start_matches('-').parse() == Ok(0.0) { "0" } else { &text };
            let colour = if text == "0" { "#999999" } else { "#e4e4e4" };
            writeln!(
                svg,
                r##"<line x1="{left:.1}" y1="{y:.1}" x2="{right:.1}" y2="{y:.1}" stroke="{colour}"/><text x="{:.1}" y="{:.1}" text-anchor="end" fill="#555555">{text}</text>"##,
                left - 8.0,
                y + 4.0
            )
            .expect(INFALLIBLE);
        }
    }
}

/// A vertical bar between two values, with caps.
fn bar(svg: &mut String, x: f64, ends: (f64, f64), colour: &str) {
    let (low, high) = ends;
    writeln!(
        svg,
        r##"<path d="M{x:.1} {low:.1}V{high:.1}M{:.1} {low:.1}h8M{:.1} {high:.1}h8" stroke="{colour}" stroke-width="1.6" fill="none"/>"##,
        x - 4.0,
        x - 4.0
    )
    .expect(INFALLIBLE);
}

/// The picture.
pub fn svg(table: &Table<'_>) -> String {
    let plan = table.plan();
    let (budgets, arms) = (plan.budgets.len(), plan.arms.len());
    let width = BUDGET * budgets.max(3) as f64;
    let percent = |row: &Row| -> Vec<f64> {
        let spread = row.sample.map(|sample| (sample.mean, sample.std.unwrap_or(0.0)));
        let ends = spread.into_iter().flat_map(|(mean, std)| [mean - std, mean + std]);
        row.accuracies.iter().copied().chain(ends).map(|value| 100.0 * value).collect()
    };
    let accuracy = Panel::new(LEFT, width, table.rows.iter().flat_map(percent));
    let gains = table.rows.iter().filter_map(|row| Some((row, row.against?)));
    let points = gains.clone().flat_map(|(_, against)| {
        let Interval { low, high } = against.interval.unwrap_or(Interval { low: against.gain, high: against.gain });
        [100.0 * low, 100.0 * high]
    });
    let gain = Panel::new(2.0 * LEFT + width, width, points.chain([0.0]));
    let total = (gain.left + width + 24.0, TOP + HEIGHT + 64.0 + 18.0 * arms as f64);
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {:.0} {:.0}" width="{:.0}" height="{:.0}" font-family="sans-serif" font-size="12" fill="#222222">
<title>Test accuracy with few labels</title>
<rect width="100%" height="100%" fill="#ffffff"/>
"##,
        total.0, total.1, total.0, total.1
    );
    accuracy.frame("Test accuracy, %: every run, mean ± std", &mut svg);
    let baseline = &plan.arms[0].name;
    gain.frame(&format!("Gain over {baseline}, points: 95% interval"), &mut svg);

    // Arms stand side by side, so that none hides another.
    let x = |panel: &Panel, row: &Row| {
        let spread = 0.5 * BUDGET / arms as f64;
        let aside = (row.arm as f64 - (arms - 1) as f64 / 2.0) * spread;
        panel.left + panel.width * (row.budget as f64 + 0.5) / budgets as f64 + aside
    };
    let colour = |row: &Row| COLOURS[row.arm % COLOURS.len()];
    for arm in 0..arms {
        let rows = table.rows.iter().filter(|row| row.arm == arm);
        let means = rows.filter_map(|row| Some((x(&accuracy, row), accuracy.y(100.0 * row.sample?.mean))));
        let line: Vec<_> = means.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let colour = COLOURS[arm % COLOURS.len()];
        writeln!(
            svg,
            r##"<polyline points="{}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>"##,
            line.join(" ")
        )
        .expect(INFALLIBLE);
    }
    for row in &table.rows {
        let (x, colour) = (x(&accuracy, row), colour(row));
        for value in &row.accuracies {
            let y = accuracy.y(100.0 * value);
            writeln!(svg, r##"<circle cx="{:.1}" cy="{y:.1}" r="2" fill="{colour}" fill-opacity="0.45"/>"##, x + 9.0)
                .expect(INFALLIBLE);
        }
        let Some(sample) = row.sample else { continue };
        if let Some(std) = sample.std {
            bar(
                &mut svg,
                x,
                (accuracy.y(100.0 * (sample.mean - std)), accuracy.y(100.0 * (sample.mean + std))),
                colour,
            );
        }
        let y = accuracy.y(100.0 * sample.mean);
        writeln!(svg, r##"<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="{colour}"/>"##).expect(INFALLIBLE);
    }
    for (row, against) in gains {
        let (x, y, colour) = (x(&gain, row), gain.y(100.0 * against.gain), colour(row));
        if let Some(Interval { low, high }) = against.interval {
            bar(&mut svg, x, (gain.y(100.0 * low), gain.y(100.0 * high)), colour);
        }
        // Full: the interval excludes 0.
        let fill = if against.significant() == Some(true) { colour } else { "#ffffff" };
        writeln!(
            svg,
            r##"<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.6"/>"##
        )
        .expect(INFALLIBLE);
    }
    for (place, budget) in plan.budgets.iter().enumerate() {
        for panel in [&accuracy, &gain] {
            let x = panel.left + panel.width * (place as f64 + 0.5) / budgets as f64;
            let text = [(20.0, escaped(&short(&budget.labels))), (36.0, format!("{} images", budget.images))];
            for (below, text) in text {
                writeln!(
                    svg,
                    r##"<text x="{x:.1}" y="{:.1}" text-anchor="middle">{text}</text>"##,
                    TOP + HEIGHT + below
                )
                .expect(INFALLIBLE);
            }
        }
    }
    for (place, arm) in plan.arms.iter().enumerate() {
        let (y, colour) = (TOP + HEIGHT + 64.0 + 18.0 * place as f64, COLOURS[place % COLOURS.len()]);
        writeln!(
            svg,
            r##"<circle cx="{:.1}" cy="{:.1}" r="4" fill="{colour}"/><text x="{:.1}" y="{y:.1}">{} (n = {})</text>"##,
            LEFT + 4.0,
            y - 4.0,
            LEFT + 16.0,
            escaped(&arm.name),
            plan.seeds
        )
        .expect(INFALLIBLE);
    }
    writeln!(
        svg,
        r##"<text x="{:.1}" y="{:.1}">filled: the interval excludes 0</text>"##,
        gain.left,
        TOP + HEIGHT + 64.0
    )
    .expect(INFALLIBLE);
    svg + "</svg>\n"
}

/// The end of a long name, which is where names of lists differ.
fn short(text: &str) -> String {
    const MOST: usize = 14;
    let length = text.chars().count();
    if length <= MOST { text.into() } else { format!("…{}", text.chars().skip(length - MOST).collect::<String>()) }
}
