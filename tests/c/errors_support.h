// What the tests of refusals share.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "catch.h"
#include "flatmtl.h"

// A valid call of a function; argument `missing` (from 0, in the order of `pointers`) is NULL.
struct Call {
  std::string name;
  std::vector<std::string> pointers;  // names as error.argument gives them
  std::function<flatmtl_status(int missing, flatmtl_error *error)> call;
};

template <typename T>
T *unless(bool missing, T *pointer) {
  return missing ? nullptr : pointer;
}

// Every pointer is named when it is NULL, with and without an error to fill.
inline void check_null(const Call &call) {
  INFO("flatmtl_" << call.name);
  for (int i = 0; i < static_cast<int>(call.pointers.size()); i++) {
    const std::string &pointer = call.pointers[static_cast<size_t>(i)];
    INFO(pointer);
    flatmtl_error error{};
    CHECK(call.call(i, &error) == FLATMTL_ERROR_NULL);
    CHECK(error.status == FLATMTL_ERROR_NULL);
    CHECK(error.argument == pointer);
    CHECK(call.call(i, nullptr) == FLATMTL_ERROR_NULL);
    char text[256];
    CHECK(flatmtl_error_message(&error, text, sizeof text) == FLATMTL_OK);
    CHECK(std::string(text) == pointer + ": is NULL");
  }
}
