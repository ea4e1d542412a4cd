// A stand-in for libhiprtc.so: compiles a kernel source for the host, against kernels/hip/prelude_host.h, into a shared library.
//
// HIP knows the size of a kernel's arguments from its metadata; here the compiled library says it in variables of its own.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <string>

namespace {

enum Result { SUCCESS = 0, COMPILATION = 6 };

struct Program {
  std::string source, name, log, image;
};

namespace fs = std::filesystem;

std::string contents(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

std::string quoted(const std::string& word) { return "'" + word + "'"; }

// Where the libraries of the stand-in are.
fs::path own_directory() {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&own_directory), &info);
  return fs::absolute(info.dli_fname).parent_path();
}

// `unsigned NAME_argument_bytes` for every kernel of a preprocessed source.
std::string argument_sizes(const std::string& preprocessed) {
  const std::regex kernel(R"re(extern "C" void (\w+) ?\(const (\w+) \w+\))re");
  std::string result;
  for (std::sregex_iterator match(preprocessed.begin(), preprocessed.end(), kernel), end; match != end; ++match)
    result += "extern \"C\" const unsigned " + match->str(1) + "_argument_bytes = sizeof(" + match->str(2) + ");\n";
  return result;
}

// Whether a command succeeds; what it says is added to the log.
bool runs(const std::string& command, const fs::path& log, std::string& said) {
  const bool good = std::system((command + " 2>" + quoted(log)).c_str()) == 0;
  said += contents(log);
  return good;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API int hiprtcVersion(int* major, int* minor) { return *major = 9, *minor = 0, SUCCESS; }

API int hiprtcCreateProgram(void** program, const char* source, const char* name, int, const char**, const char**) {
  *program = new Program{source, name, {}, {}};
  return SUCCESS;
}

API int hiprtcDestroyProgram(void** program) { return delete static_cast<Program*>(*program), *program = nullptr, SUCCESS; }

API int hiprtcCompileProgram(void* handle, int n_options, const char** options) {
  Program& program = *static_cast<Program*>(handle);
  std::string flags = "-O2 -march=native -ffp-contract=off -fno-extern-tls-init -fPIC -w";
  for (int i = 0; i < n_options; i++) {
    const std::string option = options[i];
    if (option.rfind("--offload-arch=", 0) == 0) flags += option.rfind("--offload-arch=gfx9", 0) == 0 ? " -DHOST_WAVE=64" : " -DHOST_WAVE=32";
    else if (option.rfind("-O", 0) != 0) flags += " " + quoted(option);
  }
  char pattern[] = "/tmp/standin-hiprtc-XXXXXX";
  const fs::path directory = mkdtemp(pattern);
  const fs::path source = directory / "kernel.cpp", preprocessed = directory / "preprocessed.cpp";
  const fs::path library = directory / "kernel.so", log = directory / "log";
  write(source, program.source);
  bool good = runs("g++ -E -P " + flags + " -o " + quoted(preprocessed) + " " + quoted(source), log, program.log);
  if (good) {
    const std::string text = contents(preprocessed);
    write(preprocessed, text + "\n" + argument_sizes(text));
    good = runs("g++ -shared " + flags + " -o " + quoted(library) + " " + quoted(preprocessed) + " -L" + quoted(own_directory()) +
                    " -Wl,--no-as-needed -lamdhip64",
                log, program.log);
  }
  if (good) program.image = contents(library);
  fs::remove_all(directory);
  return good ? SUCCESS : COMPILATION;
}

API int hiprtcGetProgramLogSize(void* program, std::size_t* nbytes) { return *nbytes = static_cast<Program*>(program)->log.size() + 1, SUCCESS; }
API int hiprtcGetProgramLog(void* program, char* log) { return std::strcpy(log, static_cast<Program*>(program)->log.c_str()), SUCCESS; }
API int hiprtcGetCodeSize(void* program, std::size_t* nbytes) { return *nbytes = static_cast<Program*>(program)->image.size(), SUCCESS; }

API int hiprtcGetCode(void* program, char* image) {
  const std::string& own = static_cast<Program*>(program)->image;
  std::memcpy(image, own.data(), own.size());
  return SUCCESS;
}
