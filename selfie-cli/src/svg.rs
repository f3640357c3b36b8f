//! What every picture of ours needs.

/// Told apart by the colour-blind as well: Okabe and Ito (2008), without yellow, which is too light for lines.
pub const COLOURS: [&str; 7] = ["#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

/// As text of XML or HTML, also between quotes.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
