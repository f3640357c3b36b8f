//! Labels that come from files: ImageNet's flat validation folder, and lists such as SimCLR's.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use selfie_data::{Draws, ErrorKind, LabelBudget, Need, Purpose, Result, Split, open};

struct Zero;

impl Draws for Zero {
    fn words(&self, _: Purpose, _: u64, _: u32) -> [u32; 4] {
        [0; 4]
    }
}

fn seeded(_: u64) -> Arc<dyn Draws> {
    Arc::new(Zero)
}

fn put(root: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        let path = root.join(name);
        fs::create_dir_all(path.parent().expect("inside")).expect("writable");
        fs::write(path, text).expect("writable");
    }
}

const PIXEL: &str = "P6 1 1 255\n\0\0\0";

const IMAGENET: [(&str, &str); 5] = [
    ("train/n02/n02_1.JPEG", PIXEL),
    ("train/n01/n01_1.JPEG", PIXEL),
    ("val/ILSVRC2012_val_00000002.JPEG", PIXEL),
    ("val/ILSVRC2012_val_00000001.JPEG", PIXEL),
    ("val/ILSVRC2012_val_00000003.JPEG", PIXEL),
];

/// Opens the validation part of the folder and of a tar of it, which must agree; its labels.
fn flat(files: &[(&str, &str)]) -> Result<Vec<u32>> {
    let root = tempfile::tempdir().expect("a temporary folder");
    put(&root.path().join("data"), &IMAGENET);
    put(&root.path().join("data"), files);
    let tar = root.path().join("data.tar");
    let mut builder = tar::Builder::new(File::create(&tar).expect("writable"));
    builder.append_dir_all("imagenet", root.path().join("data")).and_then(|()| builder.finish()).expect("writable");
    let [folder, tar] = [root.path().join("data"), tar].map(|path| -> Result<Vec<u32>> {
        let test = open(&path, Split::Test, Need::Labels, &seeded)?;
        assert_eq!(open(&path, Split::Train, Need::Labels, &seeded)?.classes(), test.classes());
        assert_eq!(test.key(0), "val/ILSVRC2012_val_00000001.JPEG");
        Ok((0..test.len()).map(|index| test.label(index).expect("labelled")).collect())
    });
    match (folder, tar) {
        (Ok(folder), Ok(tar)) => {
            assert_eq!(folder, tar);
            Ok(folder)
        }
        (Err(folder), Err(tar)) => {
            assert_eq!((folder.kind(), tar.kind()), (ErrorKind::Input, ErrorKind::Input));
            let (root, here) = (root.path().display().to_string(), |text: String| {
                text.replace("data.tar/imagenet", "data").replace("data.tar", "data")
            });
            assert_eq!(folder.to_string().replace(&root, ""), here(tar.to_string()).replace(&root, ""));
            Err(folder)
        }
        (folder, tar) => panic!("folder {folder:?}, tar {tar:?}"),
    }
}

#[test]
fn a_flat_validation_folder_is_labelled_by_a_file() {
    let files = [
        "ILSVRC2012_val_00000001.JPEG n02\nval/ILSVRC2012_val_00000002.JPEG n01\n\nILSVRC2012_val_00000003.JPEG n02",
        "\u{feff}ILSVRC2012_val_00000003.JPEG\t1\r\nILSVRC2012_val_00000002.JPEG\t0\r\nILSVRC2012_val_00000001.JPEG\t1\r\n",
    ];
    for text in files {
        for name in ["val.txt", "val/val.txt", "val_labels.txt", "val/val_labels.txt"] {
            assert_eq!(flat(&[(name, text)]).expect("well formed"), [1, 0, 1], "{name}");
        }
    }
    let kaggle = "ImageId,PredictionString\nILSVRC2012_val_00000003,n02 1 2 3 4 n02 5 6 7 8 \n\
                  ILSVRC2012_val_00000001,n02 111 108 244 300 \nILSVRC2012_val_00000002,n01 1 1 1 1 \n";
    assert_eq!(flat(&[("LOC_val_solution.csv", kaggle)]).expect("well formed"), [1, 0, 1]);
    let tensorflow = ("imagenet_2012_validation_synset_labels.txt", "n02\nn01\nn02\n");
    assert_eq!(flat(&[tensorflow]).expect("well formed"), [1, 0, 1]);
    // The devkit's file does no harm beside another.
    let devkit = ("ILSVRC2012_validation_ground_truth.txt", "490\n361\n171\n");
    assert_eq!(flat(&[tensorflow, devkit]).expect("well formed"), [1, 0, 1]);
    let message = flat(&[devkit]).expect_err("its numbers mean something else").to_string();
    assert!(message.contains("LOC_val_solution.csv") && message.contains("an order of its own"), "{message}");
    let message = flat(&[]).expect_err("no labels").to_string();
    assert!(message.contains("3 images outside class folders") && message.contains("val.txt"), "{message}");
}

#[test]
fn label_files_that_do_not_fit_are_refused_by_name() {
    let line = |number: usize, class: &str| format!("ILSVRC2012_val_0000000{number}.JPEG {class}\n");
    let two = line(1, "n02") + &line(2, "n01");
    for (name, text, part) in [
        ("val.txt", two.clone(), "none for ILSVRC2012_val_00000003.JPEG"),
        ("val.txt", two.clone() + &line(4, "n01"), "on line 3, found `ILSVRC2012_val_00000004.JPEG`"),
        ("val.txt", two.clone() + &line(2, "n01"), "on line 3, found `ILSVRC2012_val_00000002.JPEG` again"),
        ("val.txt", two.clone() + &line(3, "n03"), "class folder of train/ on line 3, found `n03`"),
        // Numbers beside names.
        ("val.txt", two.clone() + &line(3, "1"), "class folder of train/ on line 3, found `1`"),
        ("val.txt", line(1, "0") + &line(2, "2"), "number from 0 to 1 on line 2, found `2`"),
        ("val.txt", "ILSVRC2012_val_00000001.JPEG\n".into(), "`file class` on line 1"),
        ("LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001\n".into(), "on line 2"),
        (
            "imagenet_2012_validation_synset_labels.txt",
            "n01\nn02\n".into(),
            "a line for each of the 3 images of val/, found 2",
        ),
        ("imagenet_2012_validation_synset_labels.txt", "n01\nn02\nn09".into(), "on line 3, found `n09`"),
    ] {
        let message = flat(&[(name, &text)]).expect_err("must be refused").to_string();
        assert!(message.contains(part) && message.contains(name), "{part}: {message}");
    }
    let root = tempfile::tempdir().expect("a temporary folder");
    put(root.path(), &IMAGENET);
    fs::write(root.path().join("val.txt"), b"\x00\xff\xfe\x80").expect("writable");
    let error = open(root.path(), Split::Test, Need::Labels, &seeded).err().expect("no text");
    assert!(error.to_string().contains("UTF-8"), "{error}");
}

/// What a list selects of ImageNet's training part, as keys.
fn selected(list: &[u8]) -> Result<Vec<String>> {
    let root = tempfile::tempdir().expect("a temporary folder");
    let names = ["n01440764/n01440764_10183.JPEG", "n01440764/n01440764_9.JPEG", "n01443537/n01443537_2.JPEG"];
    for name in names.into_iter().chain(["n01440764/same.JPEG", "n01443537/same.JPEG"]) {
        put(root.path(), &[(&format!("train/{name}"), PIXEL)]);
    }
    let data = open(root.path(), Split::Train, Need::Labels, &seeded).expect("a good folder");
    let path = root.path().join("1percent.txt");
    fs::write(&path, list).expect("writable");
    let chosen = LabelBudget::Named(path).select(&*data, &seeded)?;
    Ok(chosen.into_iter().map(|index| data.key(index)).collect())
}

#[test]
fn lists_of_simclr_select_their_images() {
    let expected = ["train/n01440764/n01440764_10183.JPEG", "train/n01443537/n01443537_2.JPEG"];
    for list in [
        "n01440764_10183.JPEG\nn01443537_2.JPEG\n",
        "n01443537_2.JPEG\r\nn01440764_10183.JPEG",
        "\u{feff}n01440764_10183.JPEG\nn01443537_2.JPEG\n\n",
        "train/n01440764/n01440764_10183.JPEG\tfish\nn01443537_2.JPEG\n",
    ] {
        assert_eq!(selected(list.as_bytes()).expect("all known"), expected, "{list:?}");
    }
    assert_eq!(selected(b"train/n01443537/same.JPEG").expect("a whole key"), ["train/n01443537/same.JPEG"]);
    for (list, part) in [
        (
            b"n01443537_2.JPEG\nsame.JPEG".as_slice(),
            "`same.JPEG` on line 2, which is train/n01440764/same.JPEG and train/n01443537/same.JPEG",
        ),
        (b"# a comment\n", "`# a comment` on line 1"),
        (b"\x89PNG\xff\x00", "UTF-8"),
        (b"\x00\x01\x02", "line 1"),
        (b"\xef\xbb\xbf\n", "found none"),
        (b"n01443537_2\n", "line 1"),
        // Bytes that break a line, and capitals.
        (b"n01443537_2.JPEG\0\n", "`n01443537_2.JPEG\\x00` on line 1"),
        (b"train/N01443537/n01443537_2.JPEG", "but like train/n01443537/n01443537_2.JPEG with other capitals"),
    ] {
        let error = selected(list).expect_err("must be refused");
        assert!(error.to_string().contains(part) && error.to_string().contains("1percent.txt"), "{error}");
    }
}
