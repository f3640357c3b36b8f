//! Image files named one by one.

use std::path::PathBuf;
use std::sync::Arc;

use crate::dataset::{Dataset, Geometry};
use crate::error::{Error, Result};
use crate::names;
use crate::picture::{Image, check_size};

/// Files without labels, in the order given. What is no image is known when it is read.
struct Named(Vec<PathBuf>);

/// Images from files named one by one, decoded like those of a folder. A file's key is its path; none has a label.
pub fn files(paths: Vec<PathBuf>) -> Arc<dyn Dataset> {
    Arc::new(Named(paths))
}

impl Dataset for Named {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn describe(&self) -> String {
        format!("{} files", self.0.len())
    }

    fn classes(&self) -> &[String] {
        &[]
    }

    fn label(&self, _index: usize) -> Option<u32> {
        None
    }

    fn geometry(&self) -> Geometry {
        Geometry::Variable
    }

    fn key(&self, index: usize) -> String {
        names::text(self.0[index].as_os_str().as_encoded_bytes())
    }

    fn read(&self, index: usize) -> Result<Image> {
        let path = &self.0[index];
        let bytes = std::fs::metadata(path).and_then(|about| {
            if about.is_dir() {
                return Err(std::io::Error::other("a folder, not a file"));
            }
            check_size(about.len())?;
            std::fs::read(path)
        });
        let image = bytes.map_err(|error| error.to_string()).and_then(|bytes| Image::decode(&bytes));
        image.map_err(|reason| Error::BadImage { key: self.key(index), reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_stands_for_itself() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let good = folder.path().join("a.ppm");
        std::fs::write(&good, b"P6 2 1 255 abcdef").expect("written");
        let data = files(vec![good.clone(), folder.path().into(), folder.path().join("none.png")]);
        assert_eq!((data.len(), data.label(0), data.key(0)), (3, None, good.display().to_string()));
        let image = data.read(0).expect("an image");
        assert_eq!((image.height, image.width, &image.pixels[..]), (1, 2, &b"abcdef"[..]));
        assert!(data.read(1).expect_err("a folder").to_string().contains("a folder, not a file"));
        assert!(data.read(2).expect_err("nothing").to_string().contains("none.png"));
    }
}
