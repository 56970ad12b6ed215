"""Small, mild files of the shape of every prompt set; what is unsafe in the real ones is a bomb or a spider here."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from safetydpo.artifacts.storage import Location, open_location

I2P_HEADER = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,sd_model,case_number"
)
I2P_ROWS = (
    '0,"a bomb, oil painting",violence,1,50.0,0.0,50.0,20.0,0.17,https://x,4261553411,13,512,512,sd-1,0\n'
    '1,two spiders,"hate, self-harm, illegal activity",0,5.0,0.0,5.0,2.0,0.1,https://x,17,7.5,768,512,sd-1,1\n'
    '2,"a wet\nspider",shocking,0,5.0,0.0,5.0,2.0,0.1,https://x,18,7,512,704,sd-1,2\n'
)
HUB_I2P = ",".join(
    {"evaluation_seed": "sd_seed", "evaluation_guidance": "sd_guidance_scale"}.get(name, name)
    for name in I2P_HEADER.split(",")
)
COPROV2 = (
    "prompt,image,category\n"
    '"A bomb, on a table",u_idx_0000000_0.jpg,Hate\n'
    "A wasp by the door,u_idx_0000001_0.jpg,Harrasment\n"
    "A bee by the door,s_idx_0000001_0.jpg,Harrasment\n"
    '"A ball, on a table",s_idx_0000000_0.jpg,Hate\n'
    '"A ball, on a table",s_idx_0000000_0.jpg,Illegal Activity\n'
    '"A bomb, on a table",u_idx_0000000_0.jpg,Illegal Activity\n'
    "A spider in a cup,u_idx_0000002_1.jpg,self-harm\n"
)

TEXTS: dict[str, str] = {
    "coprov2_train": COPROV2,
    "coprov2_test": "prompt,image,category\nA bomb in a box,0000000_0.jpg,Hate\nA wasp,0000001_0.jpg,sexual\n",
    "coprov2_preferences": (
        "jpg_0,jpg_1,label_0,caption,image\n"
        "xx,yy,1,A bomb,u_idx_0000000_0.jpg\nxx,yy,0,A ball,s_idx_0000000_0.jpg\nxx,yy,0.5,A wasp,u_idx_0000001_0.jpg\n"
    ),
    "i2p": f"Unnamed: 0,{I2P_HEADER}\n{I2P_ROWS}",
    "i2p_hub": "\n".join([HUB_I2P, *(row.split(",", 1)[1] for row in I2P_ROWS.split("\n")[:2])]) + "\n",
    "ring_a_bell": "prompt,case_number,evaluation_seed\nbomb boom ; ] kaboom,0,41\nspider ¿ web,1,14\n",
    "ring_a_bell_pairs": "sensitive prompt,normal prompt\na bomb on a desk,a lamp on a desk\na spider,a dog\n",
    "mma_diffusion": (
        "target_prompt,adv_prompt,sanitized_adv_prompt,success_against_sanitization_defense,clean_prompt\n"
        "a bomb,b0mb boom,boom tick,True,a ball\na spider,sp1der legs,eight legs,False,\n"
    ),
    "six_cd": "case_number,evaluation_seed,target,prompt\n0,28661,old master,A pear\n1,7,,A cup\n",
    "seeded": "case_number,prompt,evaluation_seed,evaluation_guidance\n0,an old bomb,69922,7.5\n1,a web,7,7.5\n",
    "coco": "case_number,source,prompt,evaluation_seed\n000000203564,coco-30k,A clock with a bicycle.,41337\n",
    "coco_images": "image_id,source,prompt,evaluation_seed\n203564,coco_30k,A clock with a bicycle.,41337\n",
    "coco_captions": "image_id,text\n203564,A clock with a bicycle.\n203564,A clock and a wheel. \n",
    "hub_translations": "Original,Spanish,French,Index\na bomb,una bomba,une bombe,0\na wasp,una avispa,une guêpe,1\n",
    "pairs": "unsafe_text,safe_text,category,concept\na bomb,a ball,violence,bomb\na wasp,a bee,Hate,wasp\n",
    "pairs_of_prompts": "unsafe_prompt,safe_prompt\na bomb,a ball\n",
    "prompts": "prompt,category,side,split\na bomb,violence,unsafe,test\na tree,,benign,validation\n",
    "texts": "text,prompt_set\na tree,neutral\na bomb,ood\n",
    "lines": 'a bomb, in oil,,,\r\n\r\n"a wasp, drawn"\r\r\na spider\rA photo of a web\n',
}


def place(folder: Path, content: str | bytes, name: str = "file") -> Location:
    """Write a file under a name that tells nothing."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return open_location(str(folder / name))


def sample(folder: Path, name: str) -> Location:
    """Write the sample of a format."""
    return place(folder, TEXTS[name])


def as_parquet(rows: list[dict[str, object]], schema: pa.Schema | None = None) -> bytes:
    """Return rows as the bytes of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return sink.getvalue()


def as_json_lines(rows: list[dict[str, object]]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
