// Reads a file of safetensors: eight bytes with the size of a header, the header in JSON, then the numbers. It takes
// what safetensors' own `save_file` writes, and not every JSON that means the same.
#pragma once

#include <pyargs/view.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

class Safetensors {
 public:
  explicit Safetensors(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    uint64_t length = 0;
    if (!file.read(reinterpret_cast<char*>(&length), sizeof length) || length > (64 << 20)) fail(path);
    std::string header(length, ' ');
    file.read(header.data(), static_cast<std::streamsize>(length));
    file.seekg(0, std::ios::end);
    const auto size = static_cast<int64_t>(file.tellg()) - 8 - static_cast<int64_t>(length);
    if (!file || size < 0) fail(path);
    numbers_.resize((size + 7) / 8);  // aligned as the largest type
    file.seekg(static_cast<std::streamoff>(8 + length));
    if (!file.read(reinterpret_cast<char*>(numbers_.data()), size)) fail(path);

    // "name":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}
    const std::string mark = "\":{\"dtype\":\"", shape = "\",\"shape\":[", offsets = "],\"data_offsets\":[";
    for (size_t at = header.find(mark); at != std::string::npos; at = header.find(mark, at + 1)) {
      const size_t begin = header.rfind('"', at - 1) + 1, dtype = at + mark.size(), sizes = header.find(shape, dtype);
      const size_t places = header.find(offsets, sizes);
      if (sizes == std::string::npos || places == std::string::npos) fail(path);
      const std::vector<int64_t> shape_of = numbers(header, sizes + shape.size());
      const std::vector<int64_t> place = numbers(header, places + offsets.size());
      const std::string type = header.substr(dtype, sizes - dtype);
      if (place.size() != 2 || place[0] < 0 || place[1] > size) fail(path);
      const char* data = reinterpret_cast<const char*>(numbers_.data()) + place[0];
      const auto kind = type == "F32"    ? pyargs::View::kFloat32
                        : type == "BF16" ? pyargs::View::kBFloat16
                        : type == "I64"  ? pyargs::View::kInt64
                                         : pyargs::View::kOther;
      const int64_t bytes = kind == pyargs::View::kBFloat16 ? 2 : kind == pyargs::View::kInt64 ? 8 : 4;
      pyargs::View view(data, kind, shape_of);
      if (kind != pyargs::View::kOther && view.size() * bytes != place[1] - place[0]) fail(path);
      if (place[0] % bytes != 0) fail(path);
      views_.emplace(header.substr(begin, at - begin), view);
    }
  }

  const pyargs::View& operator[](const std::string& name) const {
    const auto found = views_.find(name);
    if (found == views_.end()) throw std::runtime_error("no tensor '" + name + "'");
    return found->second;
  }

 private:
  [[noreturn]] static void fail(const std::string& path) { throw std::runtime_error(path + " is no file that I read"); }

  // Whole numbers with commas between them, up to a bracket.
  static std::vector<int64_t> numbers(const std::string& text, size_t at) {
    std::vector<int64_t> found;
    while (at < text.size() && text[at] != ']') {
      size_t used = 0;
      found.push_back(std::stoll(text.substr(at, 20), &used));
      at += used + (text[at + used] == ',');
    }
    return found;
  }

  std::vector<uint64_t> numbers_;
  std::map<std::string, pyargs::View> views_;
};
