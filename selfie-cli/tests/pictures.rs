//! `neighbors` and `map`: what lies near what, as a list, a sheet of pictures and a page.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{bitmap_of, fails, text, works, write};
use serde_json::Value;

const DATA: &str = "synthetic:train=30,test=10,classes=3";

fn pretrained(folder: &Path) -> PathBuf {
    let run = folder.join("pre");
    works(&format!("pretrain --data {DATA} --out {} --preset tiny --batch 8 --steps 6 --seed 7", text(&run)));
    run
}

/// Names and vectors of a CSV of `embed`.
fn vectors(run: &Path, out: &Path) -> Vec<(String, Vec<f64>)> {
    works(&format!("embed {} --l2 -o {}", text(run), text(out)));
    let table = fs::read_to_string(out).expect("written");
    let row = |line: &str| {
        let fields: Vec<&str> = line.split(',').collect();
        (fields[0].to_string(), fields[3..].iter().map(|field| field.parse().expect("a number")).collect())
    };
    table.lines().skip(1).map(row).collect()
}

#[test]
fn neighbours_are_the_nearest_vectors() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let all = vectors(&run, &folder.path().join("all.csv"));
    let sheet = folder.path().join("sheet.png");
    let found = works(&format!("neighbors {} -k 5 --queries 4 -o {} --json", text(&run), text(&sheet))).json();
    assert_eq!((&found["n"], &found["k"]), (&40.into(), &5.into()));
    let queries = found["queries"].as_array().expect("a list");
    assert_eq!(queries.len(), 4);
    for query in queries {
        let name = query["name"].as_str().expect("a name");
        let (_, own) = all.iter().find(|(other, _)| other == name).expect("an image of the data");
        let cosine = |other: &[f64]| own.iter().zip(other).map(|(a, b)| a * b).sum::<f64>();
        let mut expected: Vec<(f64, &str)> =
            all.iter().filter(|(other, _)| other != name).map(|(other, row)| (cosine(row), other.as_str())).collect();
        expected.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (neighbour, (similarity, other)) in query["neighbours"].as_array().expect("a list").iter().zip(&expected) {
            // A sum of 128 products of f32, each a rounding.
            let found = neighbour["similarity"].as_f64().expect("a number");
            assert!((found - similarity).abs() < 128.0 * f64::from(f32::EPSILON), "{neighbour} {similarity} {other}");
        }
        assert_eq!(query["neighbours"].as_array().expect("a list").len(), 5);
        assert!(query["class"].is_string() && query["neighbours"][0]["class"].is_string());
    }
    // A row for each query, 96 pixels and a frame for each picture.
    let mut reader =
        png::Decoder::new(std::io::Cursor::new(fs::read(&sheet).expect("written"))).read_info().expect("PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("small")];
    let about = reader.next_frame(&mut pixels).expect("an image");
    assert_eq!((about.width, about.height), (6 * 108 + 24, 4 * 108 + 6));
    let words = works(&format!("neighbors {} -k 2 --queries 1", text(&run))).out;
    assert_eq!(words.lines().count(), 5, "{words}");
    assert!(!words.contains('\u{1b}'), "no colours in a pipe");
}

#[test]
fn an_image_of_ones_own_is_its_own_nearest() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let data = folder.path().join("photos");
    for i in 0..6u8 {
        write(&data.join(format!("{i}.bmp")), &bitmap_of(32, |at| (at as u8).wrapping_mul(i + 2)));
    }
    let one = folder.path().join("mine.bmp");
    fs::copy(data.join("3.bmp"), &one).expect("copied");
    let line = format!("neighbors {} {} --data {}", text(&run), text(&one), text(&data));
    let found = works(&format!("{line} -k 6 --json")).json();
    let [query] = &found["queries"].as_array().expect("a list")[..] else { panic!("{found}") };
    let nearest = &query["neighbours"][0];
    assert_eq!((&query["class"], &nearest["name"]), (&Value::Null, &"3.bmp".into()));
    assert!(nearest["similarity"].as_f64().expect("a number") > 1.0 - 128.0 * f64::from(f32::EPSILON), "{found}");
    assert_eq!(query["neighbours"].as_array().expect("a list").len(), 6);
    fails(&format!("{line} -k 7"), 2, &["--k 7", "at most 6"]);
    fails(&format!("neighbors {} --data {} -k 6", text(&run), text(&data)), 2, &["at most 5", "6 images"]);
    write(&one, b"not a picture");
    fails(&line, 3, &["mine.bmp"]);
    fails(&format!("neighbors {} nowhere.png --data {}", text(&run), text(&data)), 3, &["nowhere.png"]);
    fails(&format!("neighbors {} -k 0", text(&run)), 2, &["-k"]);
    fails(&format!("neighbors {} -o x.jpg", text(&run)), 2, &["x.jpg", ".png"]);
    fails(&format!("neighbors {} --layer stage4", text(&run)), 2, &["stage1 to stage3"]);
    fails(&format!("neighbors {0} --data {1} -k 2 -o {1}/x.png", text(&run), text(&data)), 2, &["inside the data"]);
}

/// The data in a page.
fn page(path: &Path) -> Value {
    let page = fs::read_to_string(path).expect("written");
    let line = page.lines().find_map(|line| line.strip_prefix("const data = ")).expect("the data");
    serde_json::from_str(line.strip_suffix(';').expect("a statement")).expect("JSON")
}

#[test]
fn a_map_has_every_image_and_is_always_the_same() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = pretrained(folder.path());
    let map = |name: &str, more: &str| {
        let out = folder.path().join(name);
        works(&format!("map {} -o {} {more}", text(&run), text(&out)));
        out
    };
    let one = map("1.html", "--threads 1 --batch 3");
    let data = page(&one);
    assert_eq!((data["names"].as_array().map(Vec::len), data["labels"].as_array().map(Vec::len)), (Some(40), Some(40)));
    let layouts = data["layouts"].as_array().expect("a list");
    assert_eq!(layouts.iter().map(|layout| layout["name"].as_str()).collect::<Vec<_>>(), [Some("t-SNE"), Some("PCA")]);
    for layout in layouts {
        let points: Vec<f64> =
            layout["points"].as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect();
        assert_eq!(points.len(), 80);
        for axis in 0..2 {
            let values: Vec<f64> = points.iter().skip(axis).step_by(2).copied().collect();
            let spread = values.iter().fold(0.0, |most: f64, x| most.max((x - values[0]).abs()));
            assert!(spread > 0.0 && values.iter().all(|x| x.is_finite()), "{layout}");
        }
    }
    assert_eq!(fs::read(&one).expect("written"), fs::read(map("2.html", "--threads 2 --batch 16")).expect("written"));
    let sprites = data["sprites"].as_str().expect("a picture").strip_prefix("data:image/png;base64,").expect("a PNG");
    assert!(sprites.len() > 1000);

    // Names cannot end the script, and too few images have no t-SNE.
    let photos = folder.path().join("photos");
    for name in ["a<", "&</script>", "c"] {
        write(&photos.join(format!("{name}.bmp")), &bitmap_of(8, |at| (at as u8).wrapping_mul(name.len() as u8)));
    }
    let small = map("3.html", &format!("--data {} --json", text(&photos)));
    let data = page(&small);
    assert_eq!(data["names"], serde_json::json!(["&</script>.bmp", "a<.bmp", "c.bmp"]));
    assert_eq!(data["layouts"].as_array().map(Vec::len), Some(1));
    assert!(fs::read_to_string(&small).expect("written").matches("</script>").count() == 1);

    fails(&format!("map {} -o {}", text(&run), text(&one)), 2, &["1.html", "--overwrite"]);
    fails(&format!("map {} -o x.svg", text(&run)), 2, &["x.svg", ".html"]);
    fails(&format!("map {} -o x.html --perplexity 0", text(&run)), 2, &["perplexity"]);
    fs::remove_file(photos.join("a<.bmp")).and_then(|()| fs::remove_file(photos.join("c.bmp"))).expect("removed");
    let none = folder.path().join("none.html");
    fails(&format!("map {} --data {} -o {}", text(&run), text(&photos), text(&none)), 3, &["2 or more images"]);
    assert!(!none.exists());
}
