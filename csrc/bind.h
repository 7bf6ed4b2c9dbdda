// From a call in Python to a launcher's struct of arguments: one value per field, in order. A pointer comes as an
// integer, an enum as its code, a struct inside the struct as a tuple, several structs as a tuple of tuples.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace zsq {

// Stands for a field of any type while fields are counted.
struct AnyField {
  template <class T>
  operator T() const;
};

template <class Struct, std::size_t... I>
constexpr auto takes(std::index_sequence<I...>) -> decltype(Struct{(static_cast<void>(I), AnyField{})...}, true) {
  return true;
}

template <class Struct>
constexpr bool takes(...) {
  return false;
}

template <class Struct, std::size_t kCount = 1>
constexpr std::size_t field_count() {
  if constexpr (takes<Struct>(std::make_index_sequence<kCount>())) {
    return field_count<Struct, kCount + 1>();
  } else {
    return kCount - 1;
  }
}

template <class Struct>
Struct filled(const pybind11::tuple& values, std::size_t extra = 0);

template <class T>
struct Several : std::false_type {};

template <class T>
struct Several<std::vector<T>> : std::true_type {
  using Item = T;
};

struct Field {
  pybind11::handle value;

  template <class T>
  operator T() const {
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(value.cast<std::uintptr_t>());
    } else if constexpr (std::is_enum_v<T>) {
      return static_cast<T>(value.cast<int>());
    } else if constexpr (Several<T>::value) {
      T items;
      for (const pybind11::handle item : value) {
        items.push_back(filled<typename Several<T>::Item>(pybind11::reinterpret_borrow<pybind11::tuple>(item)));
      }
      return items;
    } else if constexpr (std::is_class_v<T>) {
      return filled<T>(pybind11::reinterpret_borrow<pybind11::tuple>(value));
    } else {
      return value.cast<T>();
    }
  }
};

template <class Struct, std::size_t... I>
Struct filled(const pybind11::tuple& values, std::index_sequence<I...>) {
  return Struct{Field{values[I]}...};
}

template <class Struct>
Struct filled(const pybind11::tuple& values, std::size_t extra) {
  constexpr std::size_t count = field_count<Struct>();
  if (values.size() != count + extra) {
    throw pybind11::type_error("takes " + std::to_string(count + extra) + " values, got " +
                               std::to_string(values.size()));
  }
  return filled<Struct>(values, std::make_index_sequence<count>());
}

// m.name(*fields, threads)
template <class Args>
void def_cpu(pybind11::module_& m, const char* name, void (*run)(const Args&, int)) {
  m.def(name, [run](const pybind11::args& values) {
    const Args args = filled<Args>(values, 1);
    const int threads = values[values.size() - 1].cast<int>();
    pybind11::gil_scoped_release unlocked;
    run(args, threads);
  });
}

}  // namespace zsq
