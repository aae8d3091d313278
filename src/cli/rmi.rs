//! `rmi` and `prune`: removes images, those that are named or those that nobody uses.

use std::collections::HashSet;

use anyhow::{Context as _, Result};
use clap::{Arg, ArgMatches};

use super::client::{Client, called};
use super::output::print;
use super::{Command, Context, Outcomes, strings, switch};
use crate::api::v1;

pub(super) struct Rmi;

#[async_trait::async_trait]
impl Command for Rmi {
    fn name(&self) -> &'static str {
        "rmi"
    }
    fn about(&self) -> &'static str {
        "Remove images with all their names, which are told; containers made of them go on"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![Arg::new("IMAGE").required(true).num_args(1..).help("References or ids")]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let names = strings(matches, "IMAGE");
        let mut outcomes = Outcomes::of(&names);
        for name in &names {
            outcomes.note(name, remove(&mut client, name).await)?;
        }
        Ok(outcomes.code)
    }
}

async fn remove(client: &mut Client, name: &str) -> Result<()> {
    let image = Some(v1::ImageSpec { image: name.to_owned(), ..Default::default() });
    let request = v1::ImageStatusRequest { image, verbose: false };
    let found = called(client.image.image_status(request).await)?.image;
    // For the CRI it is no error; who types a name wants to know.
    let found = found.with_context(|| format!("image {name} is not here"))?;
    // By its id: the name may be another image's by now.
    let image = Some(v1::ImageSpec { image: found.id.clone(), ..Default::default() });
    called(client.image.remove_image(v1::RemoveImageRequest { image }).await)?;
    let names: Vec<&str> = found.repo_tags.iter().chain(&found.repo_digests).map(String::as_str).collect();
    print(&removed(&found.id, &names))
}

/// The image and each name that is gone with it, a line each.
fn removed(id: &str, names: &[&str]) -> String {
    let mut text = format!("removed {id}\n");
    names.iter().for_each(|name| text.push_str(&format!("  {name}\n")));
    text
}

pub(super) struct Prune;

#[async_trait::async_trait]
impl Command for Prune {
    fn name(&self) -> &'static str {
        "prune"
    }
    fn about(&self) -> &'static str {
        "Remove images without a tag that no container is made of; with --all also those with one. Pinned ones stay"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![switch("all", Some('a'), "Also images with a tag"), switch("dry-run", None, "Only tell which")]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let images = called(client.image.list_images(v1::ListImagesRequest::default()).await)?.images;
        // Listed after the images: what a container is made of since then is among them.
        let used: HashSet<String> = client.containers().await?.into_iter().map(|c| c.image_id).collect();
        for image in images {
            if image.pinned || used.contains(&image.id) || (!image.repo_tags.is_empty() && !matches.get_flag("all")) {
                continue;
            }
            if !matches.get_flag("dry-run") {
                let spec = v1::ImageSpec { image: image.id.clone(), ..Default::default() };
                called(client.image.remove_image(v1::RemoveImageRequest { image: Some(spec) }).await)?;
            }
            let names: Vec<&str> = image.repo_tags.iter().chain(&image.repo_digests).map(String::as_str).collect();
            match matches.get_flag("dry-run") {
                true => print(&format!("{}  {}\n", image.id, names.join(" ")))?,
                false => print(&removed(&image.id, &names))?,
            }
        }
        Ok(0)
    }
}
