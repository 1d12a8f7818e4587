// Draws a face with the graphs of `mogle-rt export`, by onnxruntime's C++ API alone: no Python, no PyTorch.
//
//     face EXPORTED MASK.png PROMPT.safetensors IMAGE.png [--steps N] [--guidance G] [--seed N] [--latents FILE]
//
// EXPORTED is the folder of an export in fp32. MASK.png shows the classes in their colours, as `mogle-rt examples` writes
// them; its sides are multiples of 16 pixels and are those of the image. PROMPT.safetensors comes from `mogle-rt embed`.
// ../../docs/deploy.md says how to build it and how to replace each part.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <onnxruntime_cxx_api.h>
#include <png.h>

using nlohmann::json;
using Shape = std::vector<int64_t>;
using Values = std::map<std::string, Ort::Value>;  // tensors by the names that the manifest gives them

constexpr int PATCH = 16;       // pixels of a token's side
constexpr int PICTURES = 20;    // of a mask: the whole mask, then one picture for each of its 19 classes

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

// Tensors

template <typename T>
Ort::Value tensor(const std::vector<T>& data, const Shape& shape) {
    Ort::AllocatorWithDefaultOptions allocator;
    Ort::Value value = Ort::Value::CreateTensor<T>(allocator, shape.data(), shape.size());
    std::memcpy(value.template GetTensorMutableData<T>(), data.data(), data.size() * sizeof(T));
    return value;
}

std::vector<float> floats(const Ort::Value& value) {
    const float* data = value.GetTensorData<float>();
    return {data, data + value.GetTensorTypeAndShapeInfo().GetElementCount()};
}

// A float32 tensor of a safetensors file: 8 bytes with the header's length, the header (JSON), and the tensors.
Ort::Value read_safetensors(const std::string& path, const std::string& name) {
    std::ifstream file(path, std::ios::binary);
    uint64_t length = 0;
    if (!file.read(reinterpret_cast<char*>(&length), sizeof length) || length > 100'000'000) fail(path + ": can't be read");
    std::string text(length, ' ');
    file.read(text.data(), static_cast<std::streamsize>(length));
    const json header = json::parse(text);
    if (!header.contains(name)) fail(path + ": holds no tensor " + name);
    const json& entry = header[name];
    if (entry["dtype"] != "F32") fail(path + ": " + name + " must be float32; write it with --dtype fp32");
    const Shape shape = entry["shape"];
    const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    std::vector<float> data(static_cast<size_t>(count));
    file.seekg(static_cast<std::streamoff>(8 + length + entry["data_offsets"][0].get<uint64_t>()));
    if (!file.read(reinterpret_cast<char*>(data.data()), count * 4)) fail(path + ": ends too early");
    return tensor(data, shape);
}

// Graphs

class Graphs {
public:
    explicit Graphs(const std::string& folder) : folder_(folder) {
        std::ifstream file(folder + "/manifest.json");
        if (!file) fail(folder + "/manifest.json: can't be read; make it with mogle-rt export");
        manifest = json::parse(file);
        const int version = manifest.at("format_version");
        if (version < 1 || version > 2) fail("manifest version " + std::to_string(version) + " is not known");
        if (manifest["dtype"] != "fp32") fail("the export must be in fp32, since this program's tensors are float32");
    }

    // Run a graph with those of the values that are its inputs, and add its outputs to them.
    void run(const std::string& name, Values& values) {
        const json& graph = manifest["graphs"].at(name);
        auto found = sessions_.find(name);
        if (found == sessions_.end()) {
            const std::string path = folder_ + "/" + graph["file"].get<std::string>();
            found = sessions_.emplace(name, Ort::Session(environment_, path.c_str(), options_)).first;
        }
        Ort::IoBinding binding(found->second);
        for (const json& input : graph["inputs"]) {
            const std::string wanted = input["name"];
            if (!values.count(wanted)) fail("graph " + name + " wants " + wanted + ", which this program doesn't know");
            binding.BindInput(wanted.c_str(), values.at(wanted));
        }
        for (const json& output : graph["outputs"]) {
            binding.BindOutput(output["name"].get<std::string>().c_str(), memory_);
        }
        found->second.Run(Ort::RunOptions{}, binding);
        std::vector<Ort::Value> results = binding.GetOutputValues();
        for (size_t i = 0; i < results.size(); ++i) {
            values.insert_or_assign(graph["outputs"][i]["name"].get<std::string>(), std::move(results[i]));
        }
    }

    json manifest;

private:
    std::string folder_;
    Ort::Env environment_{ORT_LOGGING_LEVEL_WARNING, "face"};
    Ort::SessionOptions options_;
    Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::map<std::string, Ort::Session> sessions_;
};

// Pictures

struct Picture {
    int width = 0, height = 0;
    std::vector<uint8_t> pixels;  // RGB, row after row
};

Picture read_png(const std::string& path) {
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    if (!png_image_begin_read_from_file(&image, path.c_str())) fail(path + ": " + image.message);
    image.format = PNG_FORMAT_RGB;
    Picture picture{static_cast<int>(image.width), static_cast<int>(image.height), {}};
    picture.pixels.resize(PNG_IMAGE_SIZE(image));
    if (!png_image_finish_read(&image, nullptr, picture.pixels.data(), 0, nullptr)) fail(path + ": " + image.message);
    return picture;
}

void write_png(const std::string& path, const Picture& picture) {
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    image.format = PNG_FORMAT_RGB;
    image.width = static_cast<png_uint_32>(picture.width);
    image.height = static_cast<png_uint_32>(picture.height);
    if (!png_image_write_to_file(&image, path.c_str(), 0, picture.pixels.data(), 0, nullptr)) {
        fail(path + ": " + image.message);
    }
}

// The class of each pixel, by its colour.
std::vector<uint8_t> read_labels(const Picture& mask, const json& classes) {
    std::map<std::vector<int>, uint8_t> numbers;
    for (const json& one : classes) numbers[one["color"].get<std::vector<int>>()] = one["index"];
    std::vector<uint8_t> labels(mask.pixels.size() / 3);
    for (size_t i = 0; i < labels.size(); ++i) {
        const uint8_t* p = &mask.pixels[3 * i];
        const auto found = numbers.find({p[0], p[1], p[2]});
        if (found == numbers.end()) fail("the mask has a pixel whose colour is not that of a class");
        labels[i] = found->second;
    }
    return labels;
}

// The latents of a mask's 20 pictures, [1, 20, N, 64]. Classes that the mask lacks share one black picture.
Ort::Value encode_mask(Graphs& graphs, const Picture& mask) {
    const std::vector<uint8_t> labels = read_labels(mask, graphs.manifest["classes"]);
    std::map<std::vector<uint8_t>, std::vector<float>> known;
    std::vector<float> all;
    Shape shape;
    for (int number = 0; number < PICTURES; ++number) {
        std::vector<uint8_t> pixels = mask.pixels;
        for (size_t i = 0; number > 0 && i < pixels.size(); ++i) pixels[i] = labels[i / 3] == number - 1 ? 255 : 0;
        auto latents = known.find(pixels);
        if (latents == known.end()) {
            Values values;
            values.emplace("pictures", tensor(pixels, {1, mask.height, mask.width, 3}));
            graphs.run("vae_encoder", values);
            shape = values.at("latents").GetTensorTypeAndShapeInfo().GetShape();
            latents = known.emplace(std::move(pixels), floats(values.at("latents"))).first;
        }
        all.insert(all.end(), latents->second.begin(), latents->second.end());
    }
    return tensor(all, {1, PICTURES, shape[1], shape[2]});
}

// Noise levels

// S + 1 of them, from 1 down to 0, by the formulas in the manifest. They depend on the number of image tokens.
std::vector<float> noise_levels(const json& s, int steps, int64_t tokens) {
    std::vector<float> sigmas;
    for (int k = 0; k < steps; ++k) {
        double x = steps == 1 ? 1.0 : 1.0 + k * (1.0 / steps - 1.0) / (steps - 1);
        if (s["use_dynamic_shifting"]) {
            const double base = s["base_shift"], most = s["max_shift"];
            const double first = s["base_image_seq_len"], last = s["max_image_seq_len"];
            const double mu = base + (most - base) / (last - first) * (static_cast<double>(tokens) - first);
            const double factor = s["time_shift_type"] == "linear" ? mu : std::exp(mu);
            x = factor / (factor + (1.0 / x - 1.0));
        } else {
            const double shift = s["shift"];
            x = shift * x / (1.0 + (shift - 1.0) * x);
        }
        sigmas.push_back(static_cast<float>(x));
    }
    sigmas.push_back(0.0F);
    return sigmas;
}

// The command line

struct Options {
    std::string folder, mask, prompt, image, latents;
    int steps = 28;
    float guidance = 3.5F;
    uint32_t seed = 0;
};

Options parse(int count, char** words) {
    Options options;
    std::vector<std::string*> names{&options.folder, &options.mask, &options.prompt, &options.image};
    size_t next = 0;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (word.rfind("--", 0) != 0) {
            if (next == names.size()) fail("one name too many: " + word);
            *names[next++] = word;
            continue;
        }
        if (i + 1 == count) fail(word + " wants a value");
        const std::string value = words[++i];
        if (word == "--steps") options.steps = std::stoi(value);
        else if (word == "--guidance") options.guidance = std::stof(value);
        else if (word == "--seed") options.seed = static_cast<uint32_t>(std::stoul(value));
        else if (word == "--latents") options.latents = value;
        else fail("unknown option " + word);
    }
    if (next < names.size()) {
        fail("usage: face EXPORTED MASK.png PROMPT.safetensors IMAGE.png [--steps N] [--guidance G] [--seed N] "
             "[--latents FILE]");
    }
    if (options.steps < 1) fail("--steps must be 1 or more");
    return options;
}

Ort::Value noise(const Options& options, int64_t tokens, int64_t channels) {
    if (!options.latents.empty()) return read_safetensors(options.latents, "latents");
    std::mt19937 random(options.seed);  // other noise than PyTorch's of the same seed, so another image of the same kind
    std::normal_distribution<float> normal;
    std::vector<float> data(static_cast<size_t>(tokens * channels));
    for (float& value : data) value = normal(random);
    return tensor(data, {1, tokens, channels});
}

void draw(const Options& options) {
    Graphs graphs(options.folder);
    const Picture mask = read_png(options.mask);
    if (mask.width % PATCH || mask.height % PATCH) fail(options.mask + ": its sides must be multiples of 16 pixels");
    const int64_t rows = mask.height / PATCH, columns = mask.width / PATCH, tokens = rows * columns;
    const std::vector<float> sigmas = noise_levels(graphs.manifest["schedule"]["scheduler"], options.steps, tokens);

    Values values;
    for (const char* name : {"prompt_embeds", "pooled_prompt_embeds"}) {
        values.emplace(name, read_safetensors(options.prompt, name));
        if (values.at(name).GetTensorTypeAndShapeInfo().GetShape()[0] != 1) fail(options.prompt + ": must hold one prompt");
    }
    values.emplace("mask_latents", encode_mask(graphs, mask));
    const int64_t channels = values.at("mask_latents").GetTensorTypeAndShapeInfo().GetShape()[3];

    const float scale = graphs.manifest["schedule"]["scheduler"]["num_train_timesteps"];
    std::vector<float> timesteps, model_timesteps;
    for (int k = 0; k < options.steps; ++k) {
        timesteps.push_back(sigmas[k] * scale);
        model_timesteps.push_back(timesteps.back() / 1000.0F * 1000.0F);
    }
    values.emplace("timesteps", tensor(timesteps, {options.steps}));
    values.emplace("model_timesteps", tensor(model_timesteps, {options.steps}));
    values.emplace("guidance", tensor<float>({options.guidance * 1000.0F}, {1}));
    values.emplace("grid", tensor<int64_t>({rows, columns}, {2}));
    values.emplace("position_delta", tensor<float>({0.0F, 0.0F}, {2}));
    values.emplace("position_scale", tensor<float>({1.0F}, {1}));
    graphs.run("experts", values);
    graphs.run("prepare", values);

    values.insert_or_assign("latents", noise(options, tokens, channels));
    for (int k = 0; k < options.steps; ++k) {
        values.insert_or_assign("step", tensor<int64_t>({k}, {1}));
        graphs.run("step", values);
        const float* velocity = values.at("velocity").GetTensorData<float>();
        float* latents = values.at("latents").GetTensorMutableData<float>();
        for (int64_t i = 0; i < tokens * channels; ++i) latents[i] += (sigmas[k + 1] - sigmas[k]) * velocity[i];
        std::cerr << "\rstep " << k + 1 << " of " << options.steps << std::flush;
    }
    std::cerr << "\n";

    graphs.run("vae_decoder", values);
    const float* planes = values.at("images").GetTensorData<float>();  // [1, 3, height, width], from 0 to 1
    Picture image = mask;
    const size_t pixels = image.pixels.size() / 3;
    for (size_t i = 0; i < pixels; ++i) {
        for (size_t c = 0; c < 3; ++c) {
            image.pixels[3 * i + c] = static_cast<uint8_t>(std::nearbyint(planes[c * pixels + i] * 255.0F));
        }
    }
    write_png(options.image, image);
    std::cout << options.image << "\n";
}

int main(int count, char** words) try {
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // unless whoever runs this has decided otherwise
    draw(parse(count, words));
    return 0;
} catch (const std::exception& error) {
    std::cerr << "face: " << error.what() << "\n";
    return 1;
}
