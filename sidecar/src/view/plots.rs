//! Plots as SVG, to be put into a page.

use plotters::prelude::*;

use crate::error::{Error, Result};

const SIZE: (u32, u32) = (960, 240);
const BLUE_LINE: RGBColor = RGBColor(47, 127, 209);

fn failed(error: impl std::fmt::Display) -> Error {
    Error::refused(format!("can't draw a plot: {error}"))
}

/// Where the points are: the last time and the highest value, at least 1 so that there is something to divide.
fn extent(points: &[(f64, f64)], first: f64, unit: f64) -> (f64, f64) {
    let last = points.last().map_or(1.0, |(at, _)| at - first).max(1.0);
    let highest = points.iter().map(|(_, value)| value / unit).fold(0.0, f64::max);
    (last, if highest > 0.0 { highest * 1.1 } else { 1.0 })
}

/// Megabytes a second over time, from (seconds since 1970, bytes a second).
pub fn throughput(points: &[(f64, f64)]) -> Result<String> {
    let first = points.first().map_or(0.0, |(at, _)| *at);
    let (last, highest) = extent(points, first, 1e6);
    draw(last, highest, "MB/s", |chart| {
        let line = points.iter().map(|(at, bytes)| (at - first, bytes / 1e6));
        chart
            .draw_series(AreaSeries::new(line, 0.0, BLUE_LINE.mix(0.2)).border_style(BLUE_LINE))
            .map(drop)
            .map_err(failed)
    })
}

/// Seconds that chunks took over time, from (seconds since 1970, seconds).
pub fn chunk_durations(points: &[(f64, f64)]) -> Result<String> {
    let first = points.first().map_or(0.0, |(at, _)| *at);
    let (last, highest) = extent(points, first, 1.0);
    draw(last, highest, "seconds a chunk", |chart| {
        let dots = points.iter().map(|(at, took)| Circle::new((at - first, *took), 2, BLUE_LINE.filled()));
        chart.draw_series(dots).map(drop).map_err(failed)
    })
}

type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

fn draw(
    last: f64,
    highest: f64,
    what: &str,
    series: impl for<'a, 'b> FnOnce(&mut Chart<'a, 'b>) -> Result<()>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(32)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..last, 0.0..highest)
            .map_err(failed)?;
        let (unit, name) = match last {
            7200.0.. => (3600.0, "hours"),
            300.0.. => (60.0, "minutes"),
            _ => (1.0, "seconds"),
        };
        let decimals = if highest < 2.0 { 2 } else { 1 };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(format!("{name} since the beginning"))
            .y_desc(what)
            .x_label_formatter(&|seconds| format!("{:.1}", seconds / unit))
            .y_label_formatter(&|value| format!("{value:.decimals$}"))
            .draw()
            .map_err(failed)?;
        series(&mut chart)?;
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_are_drawn_of_nothing_and_of_much() {
        for points in [vec![], vec![(1e9, 0.0)], (0..500).map(|n| (1e9 + f64::from(n) * 60.0, 5e7)).collect()]
        {
            for svg in [throughput(&points).unwrap(), chunk_durations(&points).unwrap()] {
                assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
            }
        }
    }
}
