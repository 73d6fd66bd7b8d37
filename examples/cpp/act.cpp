// One action of an exported policy with a flat observation:  ./act agent.onnx 0.3
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

static const OrtApi* ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);

static void check(OrtStatus* status) {
    if (status == nullptr) return;
    std::fprintf(stderr, "%s\n", ort->GetErrorMessage(status));
    std::exit(1);
}

static OrtValue* tensor(std::vector<float>& values, const std::vector<int64_t>& shape) {
    OrtMemoryInfo* cpu;
    OrtValue* value;
    check(ort->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &cpu));
    check(ort->CreateTensorWithDataAsOrtValue(cpu, values.data(), values.size() * sizeof(float), shape.data(), shape.size(),
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &value));
    ort->ReleaseMemoryInfo(cpu);
    return value;
}

int main(int argc, char** argv) {
    OrtEnv* env;
    OrtSessionOptions* options;
    OrtSession* session;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "act", &env));
    check(ort->CreateSessionOptions(&options));
    check(ort->SetIntraOpNumThreads(options, 1));  // The networks are small: threads only wait for each other
    check(ort->CreateSession(env, argc > 1 ? argv[1] : "agent.onnx", options, &session));

    std::vector<float> observation, noise;
    for (int i = 2; i < argc; i++) observation.push_back(std::strtof(argv[i], nullptr));
    std::vector<OrtValue*> inputs{tensor(observation, {1, static_cast<int64_t>(observation.size())})};

    size_t n_inputs, rank;
    check(ort->SessionGetInputCount(session, &n_inputs));
    if (n_inputs == 2) {  // A file that was exported with deterministic=True takes no noise
        OrtTypeInfo* type;
        const OrtTensorTypeAndShapeInfo* info;
        check(ort->SessionGetInputTypeInfo(session, 1, &type));
        check(ort->CastTypeInfoToTensorInfo(type, &info));
        check(ort->GetDimensionsCount(info, &rank));
        std::vector<int64_t> shape(rank);
        check(ort->GetDimensions(info, shape.data(), rank));
        shape[0] = 1;
        std::normal_distribution<float> normal;
        std::mt19937 generator{std::random_device{}()};
        for (int64_t i = 0; i < shape[1] * shape[2] * shape[3]; i++) noise.push_back(normal(generator));
        inputs.push_back(tensor(noise, shape));
    }

    const char* input_names[] = {"observation", "noise"};
    const char* output_names[] = {"action"};
    OrtValue* action = nullptr;
    check(ort->Run(session, nullptr, input_names, inputs.data(), n_inputs, output_names, 1, &action));
    float* values;
    size_t n_values;
    OrtTensorTypeAndShapeInfo* shape;
    check(ort->GetTensorMutableData(action, reinterpret_cast<void**>(&values)));
    check(ort->GetTensorTypeAndShape(action, &shape));
    check(ort->GetTensorShapeElementCount(shape, &n_values));
    for (size_t i = 0; i < n_values; i++) std::printf("%.7g%c", values[i], i + 1 < n_values ? ' ' : '\n');
}
