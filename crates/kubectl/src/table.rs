//! Text in columns, as Go's `text/tabwriter` aligns it.
//!
//! A cell is what ends with a tab; a column is a run of neighbouring lines that have a cell there. So a line
//! without tabs ends all columns, which `describe` relies on.

/// How wide columns are at least, and how many spaces follow the widest cell.
#[derive(Clone, Copy)]
pub struct Layout {
    pub width_min: usize,
    pub padding: usize,
}

/// `kubectl get`.
pub const GET: Layout = Layout { width_min: 6, padding: 3 };
/// `kubectl describe`, `rollout history`.
pub const DESCRIBE: Layout = Layout { width_min: 0, padding: 2 };

/// Aligns tab-separated text.
pub fn align(text: &str, layout: Layout) -> String {
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
    let mut writer = Writer { lines, layout, widths: Vec::new(), out: String::new() };
    let count = writer.lines.len();
    writer.format(0, count);
    writer.out
}

struct Writer<'t> {
    lines: Vec<Vec<&'t str>>,
    layout: Layout,
    /// Of the columns left of the one at hand.
    widths: Vec<usize>,
    out: String,
}

impl Writer<'_> {
    fn format(&mut self, mut start: usize, end: usize) {
        let column = self.widths.len();
        let mut this = start;
        while this < end {
            if !self.has_cell(this, column) {
                this += 1;
                continue;
            }
            self.write(start, this);
            start = this;
            let mut width = self.layout.width_min;
            while this < end && self.has_cell(this, column) {
                width = width.max(self.lines[this][column].chars().count() + self.layout.padding);
                this += 1;
            }
            self.widths.push(width);
            self.format(start, this);
            self.widths.pop();
            start = this;
        }
        self.write(start, end);
    }

    /// The last cell of a line ends with no tab and belongs to no column.
    fn has_cell(&self, line: usize, column: usize) -> bool {
        column + 1 < self.lines[line].len()
    }

    fn write(&mut self, start: usize, end: usize) {
        for line in &self.lines[start..end] {
            for (index, cell) in line.iter().enumerate() {
                self.out.push_str(cell);
                if let Some(width) = self.widths.get(index).filter(|_| index + 1 < line.len()) {
                    self.out.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.chars().count())));
                }
            }
            self.out.push('\n');
        }
    }
}

/// Rows that come one by one, as a watch prints them: widths only grow.
#[derive(Default)]
pub struct Growing {
    widths: Vec<usize>,
}

impl Growing {
    /// Aligns these rows with all that came before.
    pub fn rows(&mut self, rows: &[Vec<String>]) -> String {
        for row in rows {
            self.widths.resize(self.widths.len().max(row.len()), GET.width_min);
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count() + GET.padding);
            }
        }
        rows.iter().map(|row| self.line(row)).collect()
    }

    fn line(&self, row: &[String]) -> String {
        let mut line = String::new();
        for (index, (cell, width)) in row.iter().zip(&self.widths).enumerate() {
            line.push_str(cell);
            if index + 1 < row.len() {
                line.extend(std::iter::repeat_n(' ', width - cell.chars().count()));
            }
        }
        line.push('\n');
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn get_columns_are_three_spaces_apart() {
        let rows =
            [["NAME", "READY", "STATUS"], ["web-1", "1/1", "Running"], ["a-long-pod-name", "0/1", "Pending"]];
        let rows: Vec<Vec<String>> = rows.iter().map(|r| r.iter().map(|c| c.to_string()).collect()).collect();
        assert_eq!(
            Growing::default().rows(&rows),
            "NAME              READY   STATUS\nweb-1             1/1     Running\na-long-pod-name   0/1     Pending\n"
        );
    }

    #[test]
    fn narrow_columns_keep_their_least_width() {
        assert_eq!(align("A\tB\nx\ty\n", GET), "A     B\nx     y\n");
    }

    #[test]
    fn a_line_without_the_cell_ends_the_column() {
        let text = "Name:\tweb\nLabels:\tapp=web\n\tx=y\nContainers:\n  nginx:\n    Image:\tnginx\n    Container ID:\tc\n";
        assert_eq!(
            align(text, DESCRIBE),
            "Name:    web\nLabels:  app=web\n         x=y\nContainers:\n  nginx:\n    Image:         nginx\n    Container ID:  c\n"
        );
    }
}
