//! temporary
mod common;
use ndarray::{Array2, ArrayView2};
use trefoil_models::cost::{self, Work};
use trefoil_models::float::{self, Data};
use trefoil_models::job::*;
use trefoil_models::*;

#[test]
#[ignore]
fn costs() {
    for name in Network::shipped() {
        let n = Network::builtin(name).unwrap();
        for (work, batch) in [(Work::Train, 128), (Work::Predict(PredictOutput::Logits), 1), (Work::Predict(PredictOutput::Class), 1), (Work::Predict(PredictOutput::Class), 128)] {
            let spec = TrainSpec { batch, ..TrainSpec::default() };
            let t = std::time::Instant::now();
            let c = cost::report(&n, &spec, work).unwrap();
            println!("{name} {work:?} b{batch}: rounds {} sent {:.3} MB dealer {:.3} MB madds {:.2}G cmp {} peak {:.0} MB  plan {:?}", c.rounds, c.bytes_sent_per_party as f64/1e6, c.dealer_bytes as f64/1e6, c.multiply_adds as f64/1e9, c.comparisons, c.peak_memory_bytes as f64/1e6, t.elapsed());
            if name=="lenet" && work==Work::Train { for l in &c.layers { println!("   {l:?}"); } }
        }
    }
}

fn raw(name: &str) -> Vec<u8> { std::fs::read(format!("/tmp/trefoil-m/{name}.raw")).unwrap() }

fn images(name: &str, mean: f32, std: f32) -> Array2<f32> {
    let b = raw(name);
    Array2::from_shape_vec((b.len()/784, 784), b.iter().map(|x| (f32::from(*x)/255.0 - mean)/std).collect()).unwrap()
}

#[test]
#[ignore]
fn pneumonia() {
    let (m, s) = (0.5719, 0.1684);
    let (xi, yi) = (images("train_images.npy", m, s), raw("train_labels.npy"));
    let (xt, yt) = (images("test_images.npy", m, s), raw("test_labels.npy"));
    let spec_of = |seed| {
        let g = |k: &str, d: f64| std::env::var(k).ok().and_then(|v| v.parse().ok()).unwrap_or(d);
        TrainSpec { batch: g("BATCH", 32.0) as usize, epochs: g("EPOCHS", 10.0) as usize, learning_rate: g("LR", 0.03), momentum: g("MU", 0.0), seed, ..TrainSpec::default() }
    };
    let net = std::env::var("NET").unwrap_or("xray".into());
    let n = if net.ends_with(".toml") { Network::parse(&std::fs::read_to_string(&net).unwrap()).unwrap() } else { Network::builtin(&net).unwrap().with_classes(2).unwrap() };
    let spec = spec_of(1);
    let c = cost::report(&n, &spec, Work::Train).unwrap();
    println!("{net}: rounds {} sent {:.2} MB dealer {:.2} MB cmp {} per step, {} steps", c.rounds, c.bytes_sent_per_party as f64/1e6, c.dealer_bytes as f64/1e6, c.comparisons, 4708/spec.batch*spec.epochs);
    let mut sums = vec![[0.0f64; 3]; spec.epochs];
    let t = std::time::Instant::now();
    for seed in 1..=5 {
        let spec = spec_of(seed);
        float::train(&n, &spec, Data { images: xi.view(), labels: &yi }, |r, model| {
            let l = model.logits(xt.view()).unwrap();
            let p = float::predictions(&l);
            let sc = float::scores(&l);
            let pos: Vec<bool> = yt.iter().map(|y| *y == 1).collect();
            let auc = outcome::auc_of_scores(&sc, &pos).unwrap();
            let acc = p.iter().zip(&yt).filter(|(a, b)| a == b).count() as f64 / yt.len() as f64;
            let rec = |c: u8| { let t = yt.iter().filter(|y| **y == c).count() as f64; p.iter().zip(&yt).filter(|(a, b)| **b == c && a == b).count() as f64 / t };
            let e = &mut sums[r.epoch];
            e[0] += acc / 5.0; e[1] += (rec(0) + rec(1)) / 10.0; e[2] += auc / 5.0;
        }).unwrap();
    }
    for (e, s) in sums.iter().enumerate() { println!("epoch {e}: acc {:.4} bal {:.4} auc {:.4}", s[0], s[1], s[2]); }
    println!("{:?}", t.elapsed());
}

#[test]
#[ignore]
fn digits() {
    let set = std::env::var("SET").unwrap_or("digits".into());
    let (m, s) = (0.1307, 0.3081);
    let (xi, yi) = (images(&format!("{set}-train-images-idx3-ubyte"), m, s), raw(&format!("{set}-train-labels-idx1-ubyte")));
    let (xt, yt) = (images(&format!("{set}-t10k-images-idx3-ubyte"), m, s), raw(&format!("{set}-t10k-labels-idx1-ubyte")));
    let g = |k: &str, d: f64| std::env::var(k).ok().and_then(|v| v.parse().ok()).unwrap_or(d);
    let spec = TrainSpec { batch: g("BATCH", 128.0) as usize, epochs: g("EPOCHS", 1.0) as usize, learning_rate: g("LR", 0.0625), momentum: g("MU", 0.0), ..TrainSpec::default() };
    let net = std::env::var("NET").unwrap_or("lenet".into());
    let n = Network::builtin(&net).unwrap();
    let t = std::time::Instant::now();
    let acc = |m: &float::Model| float::predictions(&m.logits(xt.view()).unwrap()).iter().zip(&yt).filter(|(a, b)| a == b).count() as f64 / yt.len() as f64;
    float::train(&n, &spec, Data { images: xi.view(), labels: &yi }, |r, m| println!("float epoch {} loss {:.4} acc {:.4} {:?}", r.epoch, r.loss, acc(m), t.elapsed())).unwrap();
    if std::env::var("PLAIN").is_ok() {
        let mk = |x: &Array2<f32>, y: &[u8], split: &str, tables: &mut plain_run::Tables| {
            let d = common::Synthetic { images: x.iter().copied().collect(), labels: y.to_vec(), row: 784, classes: 10 };
            d.tables(split, spec.frac_bits, tables);
        };
        let mut tables = plain_run::Tables::new();
        mk(&xi, &yi, "train", &mut tables); mk(&xt, &yt, "test", &mut tables);
        let sch = schedule(&common::train_job(&n, &spec, yi.len(), yt.len())).unwrap();
        let t = std::time::Instant::now();
        plain_run::run(&sch, &tables, None, None, |d, step, out| {
            if d == 10 || d == 20 { println!("{d} steps {:?}", t.elapsed()); }
            if out.contains_key("confusion") { let c = outcome::confusion(out).unwrap(); println!("plain {:?} acc {:.4} {:?}", step.phase, c.diag().sum() as f64 / c.sum() as f64, t.elapsed()); }
        }).unwrap();
    }
}
#[allow(dead_code)] fn unused(_: ArrayView2<f32>) {}
