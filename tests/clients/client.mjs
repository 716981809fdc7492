// Opens one exported folder with transformers.js, offline, and prints what it gives as JSON.
//
//     node client.mjs < job.json
//
// A job holds `packages` (the folder that npm installed into), `models` (the folder that the model's folder lies in), `model`,
// `dtype`, `does` (a key of `ACTIONS`) and what that one reads.
import { readFileSync, writeSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const job = JSON.parse(readFileSync(0, 'utf8'));
const tf = createRequire(join(job.packages, 'package.json'))('@huggingface/transformers');
tf.env.allowRemoteModels = false;
tf.env.allowLocalModels = true;
tf.env.localModelPath = job.models;
const options = { dtype: job.dtype, device: 'cpu' };

const plain = (tensor) => ({ dims: tensor.dims, type: tensor.type, data: Array.from(tensor.data, Number) });
const all = (outputs) =>
    Object.fromEntries(Object.entries(outputs).filter(([, value]) => value instanceof tf.Tensor).map(([k, v]) => [k, plain(v)]));

function picture({ data, width, height }) {
    return new tf.RawImage(Uint8ClampedArray.from(data), width, height, 3);
}

// What a user's picture, recording or texts become; every model class below is fed from here.
async function prepared() {
    const found = {};
    if (job.texts) {
        const tokenizer = await tf.AutoTokenizer.from_pretrained(job.model);
        found.text = tokenizer(job.texts, { truncation: true, ...(job.padding ?? { padding: true }) });
    }
    if (job.images) {
        const processor = await tf.AutoProcessor.from_pretrained(job.model);
        found.media = await processor(job.images.map(picture));
    } else if (job.audio) {
        const processor = await tf.AutoProcessor.from_pretrained(job.model);
        found.media = await processor(Float32Array.from(job.audio[0]));
    }
    return found;
}

const ACTIONS = {
    // `classes`: for `text`, `media` and `both` the model class that opens it.
    async embed() {
        const { text, media } = await prepared();
        const feeds = { text, media, both: { ...text, ...media } };
        const found = { inputs: { ...all(text), ...all(media) } };
        for (const [name, cls] of Object.entries(job.classes)) {
            const model = await tf[cls].from_pretrained(job.model, options);
            found[name] = all(await model(feeds[name]));
        }
        return found;
    },

    async classify() {
        const classify = await tf.pipeline(job.task, job.model, options);
        const given = job.images ? job.images.map(picture) : job.audio.map((samples) => Float32Array.from(samples));
        return await classify(given, job.labels, job.settings ?? {});
    },

    async transcribe() {
        const processor = await tf.AutoProcessor.from_pretrained(job.model);
        const model = await tf[job.cls].from_pretrained(job.model, options);
        const found = [];
        for (const samples of job.audio) {
            const inputs = await processor(Float32Array.from(samples));
            const tokens = await model.generate({ ...inputs, ...job.settings });
            found.push({ inputs: all(inputs), tokens: plain(tokens) });
        }
        return found;
    },

    async answer() {
        const processor = await tf.AutoProcessor.from_pretrained(job.model);
        const model = await tf[job.cls].from_pretrained(job.model, options);
        const inputs = await processor(job.prompt, job.images.map(picture), job.processing ?? {});
        const tokens = await model.generate({ ...inputs, ...job.settings });
        return { inputs: all(inputs), tokens: plain(tokens) };
    },
};

writeSync(1, '\n' + JSON.stringify(await ACTIONS[job.does]()) + '\n');
