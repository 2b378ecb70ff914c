// Catch2, version 3 or 2.13.
#ifndef FLATMTL_TESTS_CATCH_H
#define FLATMTL_TESTS_CATCH_H

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
#else
#include <catch2/catch.hpp>
#endif

#endif
