//! The roofline picture (Williams, Waterman and Patterson 2009): operations a second of each pass and shape over how many
//! operations it does for a byte, below what the device can do at most.

use std::fmt::Write as _;

use super::measure::Found;
use super::report::{Group, groups, percent, quantity, significant};
use crate::svg::{COLOURS, escaped};

/// What every writer to a `String` is.
const INFALLIBLE: &str = "writing to a string cannot fail";

/// Of the picture, and of the plot in it.
const SIZE: [f64; 2] = [900.0, 730.0];
const PLOT: [[f64; 2]; 2] = [[70.0, 870.0], [70.0, 480.0]];

/// What passes are for; each a colour.
const KINDS: [&str; 5] = [
    "convolutions, forward",
    "gradients of inputs",
    "gradients of filters",
    "both gradients",
    "transformer, objective",
];

/// So many shapes, those that take longest, have a number in the picture and a line below it.
const NUMBERED: usize = 6;

fn kind(pass: &str) -> usize {
    match pass {
        _ if !pass.contains("conv") && !pass.contains("stem") && !pass.starts_with("projection") => 4,
        _ if pass.ends_with("_forward") => 0,
        _ if pass.ends_with("_data") => 1,
        _ if pass.ends_with("_filter") => 2,
        _ => 3,
    }
}

/// Decades of both axes.
struct Axes {
    /// Of operations for a byte, and of operations a second: powers of ten.
    ends: [[f64; 2]; 2],
}

impl Axes {
    fn new(found: &Found, shapes: &[Group]) -> Self {
        let ridge = [found.ceilings.flops / found.ceilings.bytes, found.ceilings.flops];
        let points = shapes.iter().map(point).chain([ridge]);
        let none = [[f64::INFINITY, f64::NEG_INFINITY]; 2];
        let ends = points.fold(none, |ends, point| {
            [0, 1].map(|axis| [ends[axis][0].min(point[axis]), ends[axis][1].max(point[axis])])
        });
        Self { ends: ends.map(|[low, high]| [low.log10().floor(), (1.05 * high).log10().ceil()]) }
    }

    /// Where a value lies, from left to right or from bottom to top.
    fn place(&self, axis: usize, value: f64) -> f64 {
        let ([low, high], [mut from, mut to]) = (self.ends[axis], PLOT[axis]);
        if axis == 1 {
            (from, to) = (to, from);
        }
        from + (to - from) * (value.log10() - low) / (high - low)
    }

    fn point(&self, group: &Group) -> [f64; 2] {
        let [intensity, rate] = point(group);
        [self.place(0, intensity), self.place(1, rate)]
    }

    fn decades(&self, axis: usize) -> impl Iterator<Item = f64> {
        let [low, high] = self.ends[axis];
        (low as i32..=high as i32).map(|power| 10f64.powi(power))
    }
}

/// Operations for a byte, and a second.
fn point(group: &Group) -> [f64; 2] {
    [group.flops as f64 / group.bytes as f64, group.flops as f64 / group.seconds]
}

/// The picture.
pub fn svg(found: &Found) -> String {
    let [shapes, _] = groups(found);
    let step = found.passes.seconds;
    let (shapes, others): (Vec<_>, Vec<_>) =
        shapes.into_iter().partition(|group| group.flops > 0 && group.seconds > 0.0);
    let axes = Axes::new(found, &shapes);
    let [width, height] = SIZE;
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif" font-size="12" fill="#222222">
<title>Roofline of a step</title>
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="{}" y="28" font-size="15" font-weight="bold">{}</text>
<text x="{}" y="50">Every pass of a step that has products, a circle for each shape; its area is its part of the step&apos;s time.</text>
"##,
        PLOT[0][0],
        escaped(&found.device),
        PLOT[0][0]
    );
    grid(&axes, &mut svg);
    roof(found, &axes, &mut svg);
    for group in &shapes {
        circle(group, step, &axes, &mut svg);
    }
    for (rank, group) in shapes.iter().take(NUMBERED).enumerate() {
        number(rank, group, step, &axes, &mut svg);
    }
    legend(&shapes, &others, step, &mut svg);
    svg + "</svg>\n"
}

fn grid(axes: &Axes, svg: &mut String) {
    let [[left, right], [top, bottom]] = PLOT;
    for value in axes.decades(0) {
        let x = axes.place(0, value);
        writeln!(
            svg,
            r##"<line x1="{x:.1}" y1="{top}" x2="{x:.1}" y2="{bottom}" stroke="#e4e4e4"/><text x="{x:.1}" y="{}" text-anchor="middle" fill="#555555">{value}</text>"##,
            bottom + 18.0
        )
        .expect(INFALLIBLE);
    }
    for value in axes.decades(1) {
        let (y, text) = (axes.place(1, value), power(value));
        writeln!(
            svg,
            r##"<line x1="{left}" y1="{y:.1}" x2="{right}" y2="{y:.1}" stroke="#e4e4e4"/><text x="{}" y="{:.1}" text-anchor="end" fill="#555555">{text}</text>"##,
            left - 8.0,
            y + 4.0
        )
        .expect(INFALLIBLE);
    }
    writeln!(
        svg,
        r##"<text x="{:.1}" y="{}" text-anchor="middle">floating-point operations for a byte that must be moved</text>"##,
        (left + right) / 2.0,
        bottom + 38.0
    )
    .expect(INFALLIBLE);
}

/// A power of ten operations a second.
fn power(value: f64) -> String {
    let text = quantity(value, "F/s");
    text.split_once(' ').map_or(text.clone(), |(number, unit)| format!("{:.0} {unit}", number.parse().unwrap_or(value)))
}

/// What the memory allows, up to what the products allow.
fn roof(found: &Found, axes: &Axes, svg: &mut String) {
    let (flops, bytes) = (found.ceilings.flops, found.ceilings.bytes);
    let [[left, right], [_, bottom]] = PLOT;
    let (ridge, y) = (axes.place(0, flops / bytes), axes.place(1, flops));
    // The slope begins at the left edge, or where it comes up from the lower one.
    let lowest = 10f64.powf(axes.ends[0][0]).max(10f64.powf(axes.ends[1][0]) / bytes);
    let (x0, y0) = (axes.place(0, lowest).max(left), axes.place(1, lowest * bytes).min(bottom));
    writeln!(
        svg,
        r##"<path d="M{x0:.1} {y0:.1}L{ridge:.1} {y:.1}H{right}" fill="none" stroke="#222222" stroke-width="1.6"/>
<text x="{ridge:.1}" y="{:.1}">{} (matrices)</text>
<text x="{:.1}" y="{:.1}" text-anchor="end">{} (memory)</text>"##,
        y - 8.0,
        quantity(flops, "F/s"),
        (x0 + ridge) / 2.0 - 8.0,
        (y0 + y) / 2.0 - 4.0,
        quantity(bytes, "B/s")
    )
    .expect(INFALLIBLE);
}

/// A shape in words.
fn told(group: &Group, step: f64) -> String {
    let [_, rate] = point(group);
    format!(
        "{} {}: {} ms, {} of the step, {}, {} of the roofline",
        group.pass,
        group.shape.as_deref().unwrap_or_default(),
        significant(1e3 * group.seconds),
        percent(group.seconds / step),
        quantity(rate, "F/s"),
        percent(group.roofline())
    )
}

fn circle(group: &Group, step: f64, axes: &Axes, svg: &mut String) {
    let ([x, y], colour) = (axes.point(group), COLOURS[1 + kind(group.pass)]);
    let radius = (60.0 * (group.seconds / step).sqrt()).max(1.5);
    writeln!(
        svg,
        r##"<circle cx="{x:.1}" cy="{y:.1}" r="{radius:.1}" fill="{colour}" fill-opacity="0.45" stroke="{colour}"><title>{}</title></circle>"##,
        escaped(&told(group, step))
    )
    .expect(INFALLIBLE);
}

/// The number of a shape, in its circle and before its line.
fn number(rank: usize, group: &Group, step: f64, axes: &Axes, svg: &mut String) {
    let ([x, y], number) = (axes.point(group), rank + 1);
    writeln!(
        svg,
        r##"<text x="{x:.1}" y="{:.1}" text-anchor="middle" font-weight="bold">{number}</text><text x="{}" y="{}">{number}&#160;&#160;{}</text>"##,
        y + 4.0,
        PLOT[0][0],
        PLOT[1][1] + 140.0 + 18.0 * rank as f64,
        escaped(&told(group, step))
    )
    .expect(INFALLIBLE);
}

/// What the colours mean, and what is not in the picture.
fn legend(shapes: &[Group], others: &[Group], step: f64, svg: &mut String) {
    let part =
        |groups: &mut dyn Iterator<Item = &Group>| percent(groups.map(|group| group.seconds).sum::<f64>() / step);
    let (mut column, top) = (0, PLOT[1][1] + 70.0);
    for (place, name) in KINDS.iter().enumerate() {
        let mut of_kind = shapes.iter().filter(|group| kind(group.pass) == place).peekable();
        if of_kind.peek().is_none() {
            continue;
        }
        let (x, y) = (PLOT[0][0] + 270.0 * f64::from(column % 3), top + 20.0 * f64::from(column / 3));
        let colour = COLOURS[1 + place];
        writeln!(
            svg,
            r##"<circle cx="{:.1}" cy="{:.1}" r="5" fill="{colour}" fill-opacity="0.45" stroke="{colour}"/><text x="{:.1}" y="{y:.1}">{name}: {}</text>"##,
            x + 5.0,
            y - 4.0,
            x + 16.0,
            part(&mut of_kind)
        )
        .expect(INFALLIBLE);
        column += 1;
    }
    writeln!(
        svg,
        r##"<text x="{}" y="{}" fill="#555555">Not in the picture: passes without products, {} of the step.</text>"##,
        PLOT[0][0],
        top + 50.0,
        part(&mut others.iter())
    )
    .expect(INFALLIBLE);
}
